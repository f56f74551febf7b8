"""The feature cache: what has been computed once is found, checked and never computed again.

    packs/<2 hex>/<id>.safetensors    features of many clips
    commits/<id>.parquet              which of them exist, and where

A pack is written first and its commit after it, both create-only. Killed between the two, a writer
leaves a pack that nobody sees; there is no state to repair. Readers list the commits once, hold
them in memory, and ask the store for nothing else until they read features.

Two writers may compute the same key. Readers then see one entry, that of the smallest commit id,
which is the earliest; that they differ although their keys are equal is kept in `conflicts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from crab_platform import commits
from crab_platform.packs import Array, CorruptEntry, Entry, NewEntry, build_pack, open_entry, remedy
from crab_platform.ranges import Range
from crab_platform.storage import ShortRead, Store

PACK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file to be: its path in the store and its bytes."""

    path: str
    data: bytes


Publish = Callable[[Store, Blob, Blob], None]


def publish_pack_then_commit(store: Store, pack: Blob, commit: Blob) -> None:
    """The only place where features come to exist, and the order that all guarantees rest on."""
    store.create(pack.path, pack.data)
    store.create(commit.path, commit.data)


class FeatureCache:
    """A cache in a store. Small and picklable: workers get one and open the store themselves."""

    def __init__(
        self,
        store: Store,
        *,
        pack_bytes: int = PACK_BYTES,
        publish: Publish = publish_pack_then_commit,
    ) -> None:
        if pack_bytes < 1:
            raise ValueError(f"pack_bytes is {pack_bytes}; expected at least 1")
        self.store = store
        self.pack_bytes = pack_bytes
        self._publish = publish

    def commit(self, entries: Sequence[NewEntry]) -> list[Entry]:
        """Store entries and make them exist; returns where each lies, in the order given.

        Splits into packs of at most `pack_bytes` of features (an entry that is larger has a pack to
        itself) and publishes them one after the other. A key given twice with the same arrays is
        stored once and remembered for both sources; with different arrays it raises ValueError
        before anything is written.
        """
        groups: dict[str, list[NewEntry]] = {}
        for entry in entries:
            same = groups.setdefault(entry.key, [])
            if same and not _same_arrays(same[0], entry):
                raise ValueError(
                    f"key {entry.key} was given twice with different features (sources "
                    f"{same[0].source_url!r} and {entry.source_url!r}); something that changes "
                    "the result is missing from the key record, or the encoder is not deterministic"
                )
            same.append(entry)
        placed: dict[str, Entry] = {}
        for batch in _batches([same[0] for same in groups.values()], self.pack_bytes):
            path = commits.pack_path(commits.new_id())
            identifier = commits.new_id()
            data, found = build_pack(path, batch)
            rows = [(new, entry) for entry in found for new in groups[entry.key]]
            commit = Blob(path=commits.commit_path(identifier), data=commits.write_commit(rows))
            self._publish(self.store, Blob(path=path, data=data), commit)
            placed |= {entry.key: replace(entry, commit=identifier) for entry in found}
        return [placed[entry.key] for entry in entries]

    def index(self) -> CacheIndex:
        """Everything committed so far: one LIST, then one read a commit, many at a time."""
        paths = {}
        for path in self.store.list(commits.COMMITS):
            identifier = commits.commit_id(path)
            if identifier is not None:
                paths[identifier] = path
        tables: list[Any] = []
        skipped: dict[str, str] = {}
        identifiers = sorted(paths)
        files = self.store.read_all([paths[identifier] for identifier in identifiers])
        for identifier, data in zip(identifiers, files, strict=True):
            try:
                table = commits.read_commit(data)
            except commits.UnusableCommit as error:
                skipped[paths[identifier]] = error.reason
                continue
            column = pa.array([identifier] * table.num_rows, pa.string())
            tables.append(table.append_column("commit", column))
        return CacheIndex(tables, skipped)

    def read(self, entries: Sequence[Entry]) -> list[dict[str, Array]]:
        """The arrays of each entry, in the order given, every one checked against its digest.

        Ranges of a pack are coalesced, and packs are read side by side. Raises CorruptEntry, and
        returns nothing, when one is not what was committed.
        """
        wanted: dict[str, list[Range]] = {}
        slots: list[tuple[str, int]] = []
        for entry in entries:
            ranges = wanted.setdefault(entry.pack, [])
            slots.append((entry.pack, len(ranges)))
            ranges.append((entry.offset, entry.length))
        try:
            buffers = self.store.read_many(wanted)
        except (FileNotFoundError, ShortRead, ValueError) as error:
            raise self._which_is_broken(entries, error) from error
        return [
            open_entry(entry, buffers[pack][position])
            for entry, (pack, position) in zip(entries, slots, strict=True)
        ]

    def _which_is_broken(self, entries: Sequence[Entry], error: Exception) -> CorruptEntry:
        """Name the first entry whose bytes are not there; a batch's error names only a file."""
        for entry in entries:
            try:
                self.store.read_many({entry.pack: [(entry.offset, entry.length)]})
            except (FileNotFoundError, ShortRead, ValueError) as own:
                return CorruptEntry(
                    f"entry {entry.key} at byte {entry.offset} of {entry.pack}: {own}; "
                    f"{remedy(entry)}"
                )
        return CorruptEntry(f"one of {len(entries)} entries could not be read: {error}")


class CacheIndex:
    """What existed when it was loaded. All answers come from memory."""

    def __init__(self, tables: Sequence[Any], skipped: dict[str, str]) -> None:
        """`tables` in the order of their commit ids; the first row of a key counts."""
        self._table = pa.concat_tables(tables).combine_chunks() if tables else None
        self._rows: dict[str, int] = {}
        self.skipped_commits = skipped
        """Commit files that were not used: path -> reason."""
        self.conflicts: list[str] = []
        """Keys that stand in several commits with different features."""
        self.duplicates = 0
        """Rows passed over because an earlier commit has the key."""
        if self._table is not None:
            self._load()

    def _load(self) -> None:
        assert self._table is not None
        digests, homes = self._table.column("blake3"), self._table.column("commit")
        clashing: set[str] = set()
        for row, key in enumerate(self._table.column("key").to_pylist()):
            first = self._rows.setdefault(key, row)
            if first != row and homes[first].as_py() != homes[row].as_py():
                self.duplicates += 1
                if digests[first].as_py() != digests[row].as_py():
                    clashing.add(key)
        self.conflicts = sorted(clashing)

    @property
    def skipped(self) -> dict[str, int]:
        """How many commit files were not used, by reason."""
        return dict(Counter(self.skipped_commits.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def lookup(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries of those keys that exist; a key that is not in the answer is a miss."""
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        if not rows or self._table is None:
            return {}
        columns = self._table.take(pa.array(list(rows.values()), pa.int64())).to_pydict()
        found = zip(
            columns["key"],
            columns["pack"],
            columns["offset"],
            columns["length"],
            columns["blake3"],
            columns["tensors"],
            columns["commit"],
            strict=True,
        )
        return {
            key: Entry(
                key=key,
                pack=pack,
                offset=offset,
                length=length,
                blake3=digest,
                tensors=commits.specs_from_json(tensors),
                commit=commit,
            )
            for key, pack, offset, length, digest, tensors, commit in found
        }

    def known_media(self, url: str, version: str) -> str | None:
        """The SHA-256 that this URL had at this version (size with ETag or mtime), if it is known.

        None as well when commits disagree: then the media must be hashed.
        """
        return self._media.get((url, version)) if url and version else None

    @cached_property
    def _media(self) -> dict[tuple[str, str], str | None]:
        known: dict[tuple[str, str], str | None] = {}
        if self._table is not None:
            columns = self._table.select(["source_url", "source_version", "media_sha256"])
            for url, version, sha256 in zip(*columns.to_pydict().values(), strict=True):
                if url and version and known.setdefault((url, version), sha256) != sha256:
                    known[url, version] = None
        return known


def _same_arrays(one: NewEntry, other: NewEntry) -> bool:
    return one.arrays.keys() == other.arrays.keys() and all(
        one.arrays[name].shape == other.arrays[name].shape
        and one.arrays[name].tobytes() == other.arrays[name].tobytes()
        for name in one.arrays
    )


def _batches(entries: Sequence[NewEntry], limit: int) -> Iterator[list[NewEntry]]:
    batch: list[NewEntry] = []
    total = 0
    for entry in entries:
        if batch and total + entry.nbytes > limit:
            yield batch
            batch, total = [], 0
        batch.append(entry)
        total += entry.nbytes
    if batch:
        yield batch
