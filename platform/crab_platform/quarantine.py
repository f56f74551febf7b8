"""Entries that must not be used again: found damaged, or different when they were computed anew.

    quarantine/<id>.parquet     (key, commit) pairs, each with its reason

A commit is never changed, so a bad entry is taken back by a file beside it. From then on its key is
a miss, the next run computes it anew, and the bad one is garbage. Signed like commits: otherwise
anybody could make a team compute everything again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from crab_platform import commits
from crab_platform.clock import SYSTEM, Clock
from crab_platform.packs import Entry
from crab_platform.storage import Store
from crab_platform.trust import EVERYONE, Signer, Trust, file_path, parse_path

QUARANTINE = "quarantine"
QUARANTINE_SCHEMA = 1

COLUMNS = pa.schema(
    [
        ("schema", pa.int32()),
        ("key", pa.string()),
        ("commit", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

CORRUPT = "corrupt"
"""The stored bytes are not what was committed."""
RECOMPUTED_OTHERWISE = "recomputed_otherwise"
"""Computed anew, it differs by more than the tolerance kept with it."""


@dataclass(frozen=True, kw_only=True)
class BadEntry:
    """An entry to be taken back, and why."""

    key: str
    commit: str
    reason: str
    detail: str = ""


def bad_entry(entry: Entry, reason: str, detail: str) -> BadEntry:
    """What to write about an entry. Raises ValueError for one of another layer: its owners take it back."""
    if entry.layer:
        raise ValueError(f"entry {entry.key} lies in {entry.layer}, which is only read from here")
    return BadEntry(key=entry.key, commit=entry.commit, reason=reason, detail=detail)


def write_quarantine(
    store: Store, bad: Sequence[BadEntry], *, signer: Signer | None = None, clock: Clock = SYSTEM
) -> str:
    """Take these entries back; returns the path of the file that says so."""
    if not bad:
        raise ValueError("no entries to take back")
    columns: dict[str, list[object]] = {"schema": [QUARANTINE_SCHEMA] * len(bad)}
    for name in COLUMNS.names[1:]:
        columns[name] = [getattr(entry, name) for entry in bad]
    data = commits.table_to_parquet(pa.table(columns, schema=COLUMNS))
    path = file_path(QUARANTINE, clock.new_id(), data, signer)
    store.create(path, data)
    return path


def read_quarantine(store: Store, trust: Trust = EVERYONE) -> Iterator[tuple[str, BadEntry]]:
    """(path, entry) of everything that was taken back by a trusted zone."""
    for path in store.list(QUARANTINE):
        name = parse_path(path)
        if name is None or trust.distrusts_name(name):
            continue
        try:
            data = store.read(path)
        except FileNotFoundError:  # swept since it was listed
            continue
        if trust.distrusts(name, data):
            continue
        # Not skipped when unreadable: to use a bad entry is worse than to stop.
        try:
            table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read(
                columns=COLUMNS.names[1:]
            )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{store.url}/{path} says which entries are bad and cannot be read ({error}); have somebody look at "
                "it, then delete it"
            ) from error
        for row in table.to_pylist():
            yield path, BadEntry(**row)
