"""What the product computes from files that never change, computed once in a history.

An index, or a manifest as it is read, is a function of bytes that nobody can change; in a history a dozen processes ask
for the same ones again and again. Here the product's own functions run once for each question, and their answers are
remembered. What reaches the store, and when, stays the product's: all reading and listing is done every time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import numpy as np
from simulation.samples import ENTRIES

from crab_platform import catalog, commit_files, commits, identity, index, leases, trust

_answers: dict[Any, Any] = {}
"""Question -> answer, and whatever was asked by its `id`, which must stay alive."""


def forget() -> None:
    """A new history begins."""
    _answers.clear()


def once(function: Callable[..., Any], question: Any, *arguments: Any) -> Any:
    """`function(*arguments)`, unless it was asked this question before."""
    asked = (function, question)
    if asked not in _answers:
        _answers[asked] = function(*arguments), arguments
    return _answers[asked][0]


_read_commit = commits.read_commit
_with_commit = commit_files.with_commit
_build_manifest = catalog.build_manifest
_read_manifest = catalog.read_manifest
_to_table = catalog._to_table
_IndexBuilder = index.IndexBuilder
_canonical_json = identity.canonical_json
_parse_path = trust.parse_path
_parse_lease = leases._parse
_specs_to_json = commits.specs_to_json
_lookup = index.CacheIndex.lookup
_entries_with_media = index.CacheIndex.entries_with_media


def read_commit(data: bytes, columns: Sequence[str] = commits.INDEXED) -> Any:
    return once(_read_commit, (data, tuple(columns)), data, columns)


def with_commit(table: Any, identifier: str) -> Any:
    return once(_with_commit, (id(table), identifier), table, identifier)


def parse_path(path: str) -> trust.FileName | None:
    found: trust.FileName | None = once(_parse_path, path, path)
    return found


_records = {id(one.record): _canonical_json(one.record) for same in ENTRIES for one in same}
"""Of every entry that there is in any history."""


def canonical_json(value: Any) -> bytes:
    return _records.get(id(value)) or _canonical_json(value)


def parse_lease(store: Any, path: str, data: bytes) -> leases.Lease:
    found: leases.Lease = once(_parse_lease, (path, data), store, path, data)
    return found


def build_manifest(rows: Iterable[catalog.ManifestRow]) -> catalog.Manifest:
    asked = tuple(rows)
    found: catalog.Manifest = once(_build_manifest, asked, asked)
    return found


def to_table(rows: tuple[catalog.ManifestRow, ...]) -> Any:
    return once(_to_table, rows, rows)


@dataclass(frozen=True)
class _Read:
    """A store as `read_manifest` needs it, of one file that was read already."""

    url: str
    data: bytes

    def read(self, path: str) -> bytes:
        return self.data


def read_manifest(store: Any, manifest_digest: str) -> catalog.Manifest:
    data = store.read(catalog.manifest_path(manifest_digest))
    found: catalog.Manifest = once(
        _read_manifest, (data, manifest_digest), _Read(store.url, data), manifest_digest
    )
    return found


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The rows of one table, with names as numbers, and the names that these count."""

    rows: index.Rows
    names: dict[str, list[str]]


class Builder(_IndexBuilder):
    """Makes an index of the same tables once."""

    def __init__(self, layer: str = "") -> None:
        super().__init__(layer)
        self._tables: list[Any] = []

    def add(self, table: Any) -> None:
        once(_part, id(table), table)  # raises what the product's `add` raises
        self._tables.append(table)

    def _add_part(self, part: _Part) -> None:
        """`add` of rows that were added to an empty builder before, whose numbers of names are others."""
        columns = dict(vars(part.rows))
        for column, names in part.names.items():
            own = {"pack": self._packs, "tensors": self._tensors, "commit": self._commits}[column]
            numbers = [own.number(name) for name in names]
            if numbers != list(range(len(numbers))):
                columns[column] = np.asarray(numbers, np.int32)[columns[column]]
        self._parts.append(index.Rows(**columns))

    def build(
        self,
        *,
        skipped: dict[str, str] | None = None,
        quarantined: Iterable[tuple[str, str]] = (),
        below: Sequence[index.CacheIndex] = (),
        loose_commits: int = 0,
    ) -> index.CacheIndex:
        bad = tuple(quarantined)
        asked = (
            _IndexBuilder,
            self._layer,
            tuple(map(id, self._tables)),
            tuple(map(id, below)),
            bad,
            tuple((skipped or {}).items()),
            loose_commits,
        )
        if asked not in _answers:
            for table in self._tables:
                self._add_part(once(_part, id(table), table))
            made = super().build(
                skipped=skipped, quarantined=bad, below=below, loose_commits=loose_commits
            )
            _answers[asked] = made, (self._tables, below)
        found: index.CacheIndex = _answers[asked][0]
        return found


def _part(table: Any) -> _Part:
    """A table as the product's `add` makes rows of it. Raises UnusableCommit.

    Rows of two tables differ only in numbers of names, if the tables differ only in names.
    """
    cells = table.to_pydict()
    names = {name: list(dict.fromkeys(cells[name])) for name in ("pack", "tensors", "commit")}
    for name in ("pack", "commit"):
        cells[name] = map(names[name].index, cells[name])
    asked = tuple((name, *column) for name, column in cells.items())
    if asked not in _rows:
        builder = _IndexBuilder()
        builder.add(table)
        (_rows[asked],) = builder._parts
    return _Part(rows=_rows[asked], names=names)


_rows: dict[Any, index.Rows] = {}
"""Of tables of any history: a few hundred, for packs and commits stand in them as numbers."""


def lookup(self: index.CacheIndex, keys: Iterable[str]) -> dict[str, Any]:
    asked = tuple(keys)
    return dict(once(_lookup, (id(self), asked), self, asked))


def entries_with_media(self: index.CacheIndex) -> Iterator[Any]:
    return iter(once(_all_entries, id(self), self))


def _all_entries(self: index.CacheIndex) -> list[Any]:
    return list(_entries_with_media(self))


_STAND_INS = (
    (_read_commit, read_commit),
    (_with_commit, with_commit),
    (_build_manifest, build_manifest),
    (_read_manifest, read_manifest),
    (_to_table, to_table),
    (_canonical_json, canonical_json),
    (_parse_path, parse_path),
    (_parse_lease, parse_lease),
    (_specs_to_json, lru_cache(_specs_to_json)),
    (_IndexBuilder, Builder),
)


@contextmanager
def remembered() -> Iterator[None]:
    """Answers are remembered while the block lasts."""
    with ExitStack() as stack:
        modules = [
            module
            for name, module in sys.modules.items()
            if name.startswith(("crab_platform.", "simulation."))
            and module is not sys.modules[__name__]
        ]
        for real, stand_in in _STAND_INS:
            for module in modules:
                for name, value in list(vars(module).items()):
                    if value is real:
                        stack.enter_context(patch.object(module, name, stand_in))
        stack.enter_context(patch.object(index.CacheIndex, "lookup", lookup))
        stack.enter_context(
            patch.object(index.CacheIndex, "entries_with_media", entries_with_media)
        )
        # A lease is flat; asdict looks for what is in it and copies that.
        stack.enter_context(patch.object(leases, "asdict", vars, create=True))
        stack.callback(forget)
        yield
