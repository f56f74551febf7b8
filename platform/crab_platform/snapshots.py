"""Snapshots: the rows of many commits in one file, so that a reader opens ten files and not ten thousand.

    snapshots/<id>.parquet

A snapshot is never the truth. Which commits exist is what the listing of commits says; a snapshot
only spares reading those that it holds. It may be deleted at any time.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crab_platform import commits
from crab_platform.clock import SYSTEM, Clock
from crab_platform.commit_files import read_trusted, with_commit
from crab_platform.storage import Store
from crab_platform.trust import EVERYONE, FileName, Signer, Trust, file_path, parse_path

if TYPE_CHECKING:  # it reads snapshots
    from crab_platform.cache import FeatureCache

SNAPSHOTS = "snapshots"
SNAPSHOT_SCHEMA = 1
ROWS = 250_000
"""Rows of one snapshot: about 30 MB on disk, and what lies in memory at once while it is read."""
_GROUP = 50_000
FEWEST = 64
"""Commits that are worth a snapshot: fewer are read in two rounds of requests."""

COLUMNS = pa.schema(
    [
        ("schema", pa.int32()),
        *(commits.COLUMNS.field(name) for name in commits.INDEXED),
        ("commit", pa.string()),
    ]
)


def write_snapshot(
    store: Store, tables: Sequence[Any], *, signer: Signer | None = None, clock: Clock = SYSTEM
) -> str:
    """Writes rows with the columns commits.INDEXED and `commit`; returns the path."""
    table = pa.concat_tables(tables)
    schema = pa.array([SNAPSHOT_SCHEMA] * table.num_rows, pa.int32())
    table = table.append_column("schema", schema).select(COLUMNS.names).cast(COLUMNS)
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        store_schema=False,
        write_page_checksum=True,
        row_group_size=_GROUP,
    )
    data = sink.getvalue()
    path = file_path(SNAPSHOTS, clock.new_id(), data, signer)
    store.create(path, data)
    return path


def list_snapshots(store: Store, trust: Trust = EVERYONE) -> list[FileName]:
    """The snapshots of trusted zones, the oldest first."""
    names = [name for path in store.list(SNAPSHOTS) if (name := parse_path(path)) is not None]
    return [name for name in names if not trust.distrusts_name(name)]


def read_snapshots(store: Store, trust: Trust, listed: Collection[str]) -> Iterator[Any]:
    """Rows (commits.INDEXED and `commit`) of those commits in `listed` that snapshots hold, each commit once.

    A snapshot that is damaged, newer than this version or gone is passed over: its commits are read
    one by one then.
    """
    done: set[str] = set()
    for name in list_snapshots(store, trust):
        tables = _read(store, name, trust)
        if tables is None:
            continue
        held = {
            commit for table in tables for commit in table.column("commit").unique().to_pylist()
        }
        wanted = (held & set(listed)) - done
        done |= wanted
        if not wanted:
            continue
        chosen = pa.array(sorted(wanted), pa.string())
        for table in tables:
            yield table.filter(pc.is_in(table.column("commit"), value_set=chosen))


def held_commits(store: Store, trust: Trust = EVERYONE) -> dict[str, set[str]]:
    """Path of each readable snapshot -> ids of the commits that it holds."""
    found = {}
    for name in list_snapshots(store, trust):
        tables = _read(store, name, trust, columns=["schema", "commit"])
        if tables is not None:
            found[name.path] = {
                commit for table in tables for commit in table.column("commit").unique().to_pylist()
            }
    return found


def snapshot_commits(cache: FeatureCache, *, fewest: int = FEWEST) -> int:
    """Writes snapshots of all usable commits that no snapshot holds; returns how many commits these are.

    Nothing is written for fewer than `fewest`. Snapshots of which less than half the commits are still there are
    deleted, and the rest of theirs is written anew. Raises ValueError when the cache trusts zones and signs as none:
    nobody who trusts as it does would take the snapshots.
    """
    store, trust = cache.store, cache.trust
    if trust.zones and cache.signer is None:
        raise ValueError(
            f"{store.url} is read by zone, so its snapshots must be signed: give the spec a cache.zone"
        )
    held = held_commits(store, trust)
    listed = {
        name.identifier: name
        for path in store.list(commits.COMMITS)
        if (name := parse_path(path)) is not None and not trust.distrusts_name(name)
    }
    stale = [
        path for path, members in held.items() if 2 * len(members & listed.keys()) < len(members)
    ]
    kept = {commit for path, members in held.items() if path not in stale for commit in members}
    rest = [listed[identifier] for identifier in sorted(listed.keys() - kept)]
    written = 0
    if rest and len(rest) >= fewest:
        waiting: list[Any] = []
        for table in _tables(store, trust, rest):
            # Whole commits only: a reader takes all rows of a commit from one snapshot.
            if waiting and sum(one.num_rows for one in waiting) + table.num_rows > ROWS:
                write_snapshot(store, waiting, signer=cache.signer, clock=cache.clock)
                waiting = []
            waiting.append(table)
            written += 1
        if waiting:
            write_snapshot(store, waiting, signer=cache.signer, clock=cache.clock)
    for path in stale:
        store.delete(path)
    return written


def _tables(store: Store, trust: Trust, names: Sequence[FileName]) -> Iterator[Any]:
    """Rows (commits.INDEXED and `commit`) of each usable commit."""
    for name, data in read_trusted(store, trust, names, {}):
        try:
            table = commits.read_commit(data)
        except commits.UnusableCommit:
            continue
        if table.num_rows:
            yield with_commit(table, name.identifier)


def _read(
    store: Store, name: FileName, trust: Trust, columns: Sequence[str] = COLUMNS.names
) -> list[Any] | None:
    """The row groups of a snapshot; None when it cannot be used."""
    try:
        data = store.read(name.path)
        if trust.distrusts(name, data):
            return None
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        found = file.schema_arrow
        for column in COLUMNS:
            if column.name not in found.names or found.field(column.name).type != column.type:
                return None
        tables = [file.read_row_group(n, columns=list(columns)) for n in range(file.num_row_groups)]
    except (pa.ArrowException, OSError):  # also FileNotFoundError: deleted since it was listed
        return None
    for table in tables:
        if table.column("schema").unique().to_pylist() != [SNAPSHOT_SCHEMA]:
            return None
        if any(table.column(column).null_count for column in columns):
            return None
        if "pack" in columns and not commits.are_packs(table.column("pack").unique().to_pylist()):
            return None
    return [table.drop_columns(["schema"]) for table in tables]
