"""Condemned sets: what garbage collection means to delete, in steps that anybody can see and repeat.

    condemned/<id>.parquet       the set: garbage when somebody looked; nothing happens to it until it is old enough
    condemned/<id>.sweeping      from here on jobs that start leave it out; those that started before are waited for
    condemned/<id>.decision      what of the set is deleted: decided once, whoever carries it out

Each file is created once. Whoever finds them goes on where another was killed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from crab_platform import commits
from crab_platform.storage import Store

CONDEMNED = "condemned"
COLUMNS = pa.schema([("path", pa.string()), ("why", pa.string())])
_NAME = re.compile(rf"{CONDEMNED}/([0-9a-f]{{16}}-[0-9a-f]{{16}})\.(parquet|sweeping|decision)")

Doomed = dict[str, str]
"""Path -> why it is garbage."""


@dataclass(frozen=True, kw_only=True)
class CondemnedSet:
    """One set, by what there is of it."""

    identifier: str
    is_listed: bool
    is_sweeping: bool
    is_decided: bool


def set_path(identifier: str) -> str:
    return f"{CONDEMNED}/{identifier}.parquet"


def sweeping_path(identifier: str) -> str:
    return f"{CONDEMNED}/{identifier}.sweeping"


def decision_path(identifier: str) -> str:
    return f"{CONDEMNED}/{identifier}.decision"


def list_sets(store: Store) -> list[CondemnedSet]:
    """All sets, the oldest first."""
    kinds: dict[str, set[str]] = {}
    for path in store.list(CONDEMNED):
        if found := _NAME.fullmatch(path):
            kinds.setdefault(found.group(1), set()).add(found.group(2))
    return [
        CondemnedSet(
            identifier=identifier,
            is_listed="parquet" in there,
            is_sweeping="sweeping" in there,
            is_decided="decision" in there,
        )
        for identifier, there in sorted(kinds.items())
    ]


def write_doomed(store: Store, path: str, doomed: Doomed) -> None:
    """Writes a set or a decision. Raises AlreadyExists when there is one."""
    table = pa.table({"path": list(doomed), "why": list(doomed.values())}, schema=COLUMNS)
    store.create(path, commits.table_to_parquet(table))


def read_doomed(store: Store, path: str) -> Doomed:
    """Back from `write_doomed`. Raises FileNotFoundError, or ValueError when the file is damaged."""
    data = store.read(path)
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        columns = file.read(columns=COLUMNS.names).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{store.url}/{path} is damaged ({error}); delete it") from error
    return dict(zip(columns["path"], columns["why"], strict=True))


def left_out(store: Store) -> tuple[tuple[str, ...], set[str]]:
    """(ids of sets being swept, the paths in them): what a job that starts now must do without.

    Call it after the job's lease was taken and before commits are listed. A set that is not being
    swept yet is not in it: the lease, which has not `seen` it, makes its sweep wait.
    """
    seen: list[str] = []
    paths: set[str] = set()
    for found in list_sets(store):
        if not found.is_sweeping:
            continue
        seen.append(found.identifier)
        if found.is_listed:
            try:
                paths |= read_doomed(store, set_path(found.identifier)).keys()
            except (
                FileNotFoundError
            ):  # its sweep has ended since the listing: nothing of it is left
                continue
    return tuple(seen), paths


def remove_set(store: Store, found: CondemnedSet) -> None:
    """The end of a sweep. The mark goes last: while it is there, nobody takes the set's files for alive."""
    for path in (
        set_path(found.identifier),
        decision_path(found.identifier),
        sweeping_path(found.identifier),
    ):
        store.delete(path)


def paths_of(store: Store, sets: Sequence[CondemnedSet]) -> set[str]:
    """Every path that stands in one of these sets."""
    found: set[str] = set()
    for one in sets:
        if one.is_listed:
            try:
                found |= read_doomed(store, set_path(one.identifier)).keys()
            except FileNotFoundError:
                continue
    return found
