"""The files of a folder of the cache that a reader takes: listed, read many at a time, judged by their signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from crab_platform.storage import Store
from crab_platform.trust import FileName, Trust, parse_path

AT_ONCE = 256
"""Commits that are read together: bounds memory while an index is loaded."""


def list_trusted(
    store: Store, trust: Trust, folder: str, skipped: dict[str, str]
) -> list[FileName]:
    """The files of a folder by zones that are trusted; others go to `skipped`, path -> reason."""
    found = []
    for path in store.list(folder):
        name = parse_path(path)
        if name is None:
            continue
        if reason := trust.distrusts_name(name):
            skipped[path] = reason
        else:
            found.append(name)
    return found


def read_trusted(
    store: Store, trust: Trust, names: Sequence[FileName], skipped: dict[str, str]
) -> Iterator[tuple[FileName, bytes]]:
    """(name, bytes) of those that are there and rightly signed, in the order of their ids, AT_ONCE in memory."""
    ordered = sorted(names, key=lambda name: name.identifier)
    for start in range(0, len(ordered), AT_ONCE):
        batch = ordered[start : start + AT_ONCE]
        for name, data in zip(batch, _present(store, batch), strict=True):
            if data is None:
                continue
            if reason := trust.distrusts(name, data):
                skipped[name.path] = reason
            else:
                yield name, data


def with_commit(table: Any, identifier: str) -> Any:
    """Rows of a commit with a column `commit` that says which."""
    column = pa.array([identifier] * table.num_rows, pa.string())
    return table.append_column("commit", column)


def _present(store: Store, names: Sequence[FileName]) -> list[bytes | None]:
    """The bytes of each; None for one that garbage collection took since it was listed."""
    try:
        return list(store.read_all([name.path for name in names]))
    except FileNotFoundError:
        found: list[bytes | None] = []
        for name in names:
            try:
                found.append(store.read(name.path))
            except FileNotFoundError:
                found.append(None)
        return found
