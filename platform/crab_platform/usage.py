"""What finished jobs took from a cache and gave to it: the ground of `crab cache stat` and of lineage.

    usage/<id>.json

Written once by a job that ends well, never read by a job. A cache without these files works as
well as one with them; it only cannot say what it saved.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from crab_platform.clock import SYSTEM, Clock
from crab_platform.storage import Store

USAGE = "usage"
USAGE_SCHEMA = 1
DECODED = "decoded windows"
UNKNOWN = "unknown"
_AT_ONCE = 512

Kind = Literal["preprocess", "train", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One finished job. Counts are of entries; seconds are busy seconds of one core or one device."""

    kind: Kind
    job: str
    """The name that the spec gives it."""
    run: str = ""
    """Id of the run in MLflow."""
    experiment: str = ""
    team: str = ""
    at_ns: int = 0
    """When it ended; `write_usage` fills it in."""
    manifest: str = ""
    adapter: str = ""
    """Digest of the adapter that it made (train) or used (evaluate)."""
    hits: Mapping[str, int] = field(default_factory=dict)
    """Encoder, as `encoder_label` writes it -> entries found."""
    encoded: Mapping[str, int] = field(default_factory=dict)
    """The same for entries computed."""
    saved_decode_s: float = 0.0
    """What the hits had cost to decode when they were computed."""
    saved_encode_s: float = 0.0
    device: str = ""
    """Where this job encoded, or would have: "cpu" or "cuda"."""
    spent_decode_s: float = 0.0
    spent_encode_s: float = 0.0
    feature_bytes_written: int = 0
    feature_bytes_read: int = 0
    layers: Sequence[str] = ()
    """URLs of other caches whose entries it used."""


def encoder_label(record: Mapping[str, Any]) -> str:
    """What people call the encoder of a key record: its name and the start of its weights' digest.

    Decoded windows, which have no encoder, are DECODED.
    """
    encoder = record.get("encoder")
    if not isinstance(encoder, Mapping):
        return DECODED if record.get("level") == "decoded" else UNKNOWN
    return f"{encoder.get('name', UNKNOWN)} {str(encoder.get('weights_sha256', ''))[:8]}".strip()


def write_usage(store: Store, usage: Usage, clock: Clock = SYSTEM) -> str:
    """Keeps what a job did; returns the path. `at_ns` becomes the time of now where it is 0."""
    at_ns = usage.at_ns or clock.time_ns()
    record = asdict(usage) | {"schema": USAGE_SCHEMA, "at_ns": at_ns, "layers": list(usage.layers)}
    path = f"{USAGE}/{clock.new_id()}.json"
    store.create(path, json.dumps(record, sort_keys=True, allow_nan=False).encode())
    return path


def read_usage(store: Store, skipped: dict[str, str] | None = None) -> Iterator[Usage]:
    """Everything that was written, the oldest first.

    A file that is damaged or of a newer version is passed over and stands in `skipped`, path -> why:
    these are figures, and nothing is decided by them.
    """
    paths = [path for path in store.list(USAGE) if path.endswith(".json")]
    for start in range(0, len(paths), _AT_ONCE):
        batch = paths[start : start + _AT_ONCE]
        for path, data in zip(batch, store.read_all(batch), strict=True):
            try:
                yield _parse(data)
            except (ValueError, TypeError, KeyError) as error:
                if skipped is not None:
                    skipped[path] = str(error) or type(error).__name__


def _parse(data: bytes) -> Usage:
    record: dict[str, Any] = json.loads(data)
    if record["schema"] != USAGE_SCHEMA:
        raise ValueError(f"schema {record['schema']}, this version reads {USAGE_SCHEMA}")
    if record["kind"] not in get_args(Kind):
        raise ValueError(f"kind {record['kind']!r} is none of {get_args(Kind)}")
    usage = Usage(**{one.name: record[one.name] for one in fields(Usage)})
    for counts in (usage.hits, usage.encoded):
        if not all(isinstance(n, int) for n in counts.values()):
            raise ValueError("counts that are no numbers")
    for name in ("at_ns", "saved_decode_s", "saved_encode_s", "spent_decode_s", "spent_encode_s"):
        if not isinstance(getattr(usage, name), int | float):
            raise ValueError(f"{name} is no number")
    return usage
