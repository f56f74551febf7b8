"""A file on its way through the workers, and the small rows that reach the driver.

Between Ray workers travel JSON for what is small and one binary column for decoded arrays: one array a stream of a
clip, never a row or a block a frame.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from crab_platform.catalog import ManifestRow
from crab_platform.packs import Entry, TensorSpec
from crab_platform.work import Array, Source, Undecoded


@dataclass(frozen=True, kw_only=True)
class Row:
    """What happened to one stream of one file: all that travels to the driver."""

    name: str
    stream: str
    status: Literal["hit", "encoded", "set_aside"]
    key: str = ""
    media_sha256: str = ""
    entry: Entry | None = None
    reason: str = ""
    detail: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    media_bytes: int = 0
    decoded: bool = False
    """Set on one row of a file that was decoded, like `seconds`, `media_bytes` and `last_of_file`."""
    last_of_file: bool = True

    def manifest_row(self, name: str) -> ManifestRow:
        """The row of the manifest under one of the names of the file."""
        return ManifestRow(
            source=name,
            stream=self.stream,
            status="ready" if self.entry else "set_aside",
            reason=self.reason,
            detail=self.detail,
            media_sha256=self.media_sha256,
            entry=self.entry,
        )


@dataclass(kw_only=True)
class File:
    """A file on its way through a worker."""

    source: Source
    sha256: str = ""
    version: str | None = None
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    found: dict[str, Entry] = field(default_factory=dict)
    lost: dict[str, Undecoded] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    """What the encoders are given, by stream."""
    decode_s: dict[str, float] = field(default_factory=dict)
    """Streams that were decoded from the media, with the seconds it took; others came from the cache."""
    decoded: bool = False


def file_to_table(file: File) -> pa.Table:
    head = {
        "source": [file.source.name, file.source.url, list(file.source.streams)],
        "sha256": file.sha256,
        "version": file.version,
        "num_bytes": file.num_bytes,
        "seconds": dict(file.seconds),
        "decode_s": file.decode_s,
        "found": {stream: asdict(entry) for stream, entry in file.found.items()},
        "lost": {stream: asdict(lost) for stream, lost in file.lost.items()},
        "arrays": [[s, str(array.dtype), list(array.shape)] for s, array in file.arrays.items()],
        "decoded": file.decoded,
    }
    data = [np.ascontiguousarray(array).data.cast("B") for array in file.arrays.values()]
    return pa.table(
        {
            "head": pa.array([json.dumps(head)], pa.string()),
            "data": pa.array([data], pa.list_(pa.large_binary())),
        }
    )


def file_from_row(row: Mapping[str, Any]) -> File:
    head = json.loads(row["head"])
    name, url, streams = head["source"]
    arrays = {
        stream: np.frombuffer(data, dtype=dtype).reshape(shape)
        for (stream, dtype, shape), data in zip(head["arrays"], row["data"], strict=True)
    }
    return File(
        source=Source(name=name, url=url, streams=tuple(streams)),
        sha256=head["sha256"],
        version=head["version"],
        num_bytes=head["num_bytes"],
        seconds=defaultdict(float, head["seconds"]),
        found={stream: _entry(entry) for stream, entry in head["found"].items()},
        lost={stream: Undecoded(**lost) for stream, lost in head["lost"].items()},
        arrays=arrays,
        decode_s=head["decode_s"],
        decoded=head["decoded"],
    )


def row_to_json(row: Row) -> str:
    return json.dumps(asdict(row))


def row_from_json(text: str) -> Row:
    fields = json.loads(text)
    entry = fields.pop("entry")
    return Row(entry=_entry(entry) if entry else None, **fields)


def _entry(values: Mapping[str, Any]) -> Entry:
    tensors = tuple(
        TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in values["tensors"]
    )
    return Entry(**{**values, "tensors": tensors})
