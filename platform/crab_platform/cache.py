"""The feature cache: what has been computed once is found, checked and never computed again.

    packs/<2 hex>/<id>.safetensors    features of many clips
    commits/<id>.parquet              which of them exist, and where
    quarantine/<id>.parquet           which of them must not be used after all
    snapshots/<id>.parquet            copies of many commits in one file, to load faster

A pack is written first and its commit after it, both create-only. Killed between the two, a writer
leaves a pack that nobody sees; there is no state to repair. Readers list the commits once, hold
them in memory, and ask the store for nothing else until they read features.

Two writers may compute the same key. Readers then see one entry, that of the smallest commit id,
which is the earliest; that they differ although their keys are equal is kept in `conflicts`.

Caches can be layered: what this one lacks is looked for in those below, which are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from crab_platform import commits, snapshots
from crab_platform.clock import SYSTEM, Clock
from crab_platform.commit_files import list_trusted, read_trusted, with_commit
from crab_platform.commits import NOBODY, Writer
from crab_platform.index import CacheIndex, IndexBuilder
from crab_platform.local_tier import LocalTier
from crab_platform.packs import (
    Array,
    CorruptEntry,
    Entry,
    NewEntry,
    build_pack,
    open_entry,
    remedy,
)
from crab_platform.quarantine import read_quarantine
from crab_platform.ranges import Range
from crab_platform.storage import ShortRead, Store
from crab_platform.trust import EVERYONE, FileName, Signer, Trust, file_path

PACK_BYTES = 256 << 20

PUBLISH_LIMIT_S = 3600.0
"""Longest time between writing a pack and its commit. Far below the grace of garbage collection, which takes a pack
without a commit for one whose writer died."""


class PublishTooSlow(Exception):  # noqa: N818 (says what happened; nothing was published)
    """A pack took so long to write that its commit must not follow; the work is done again."""


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file to be: its path in the store and its bytes."""

    path: str
    data: bytes


Publish = Callable[[Store, Blob, Blob], None]


def publish_pack_then_commit(
    store: Store, pack: Blob, commit: Blob, *, clock: Clock = SYSTEM
) -> None:
    """The only place where features come to exist, and the order that all guarantees rest on."""
    started = clock.monotonic()
    store.create(pack.path, pack.data)
    if clock.monotonic() - started > PUBLISH_LIMIT_S:
        raise PublishTooSlow(
            f"{store.url}/{pack.path} took {clock.monotonic() - started:.0f} s to write; run the job again"
        )
    store.create(commit.path, commit.data)


class FeatureCache:
    """A cache in a store. Small and picklable: workers get one and open the store themselves."""

    def __init__(
        self,
        store: Store,
        *,
        pack_bytes: int = PACK_BYTES,
        publish: Publish | None = None,
        writer: Writer = NOBODY,
        signer: Signer | None = None,
        trust: Trust = EVERYONE,
        layers: Sequence[Store] = (),
        local: LocalTier | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        """`layers` are other caches, read when this one lacks a key; `local` keeps what was read on a disk nearby.

        Raises ValueError when `trust` is given and does not take what `signer` signs: a team would not see its own.
        """
        if pack_bytes < 1:
            raise ValueError(f"pack_bytes is {pack_bytes}; expected at least 1")
        if trust.zones and signer is not None and signer.zone not in trust.zones:
            raise ValueError(
                f"signs as zone {signer.zone!r} and trusts only {', '.join(sorted(trust.zones))}: it would not "
                "read what it writes"
            )
        self.store = store
        self.pack_bytes = pack_bytes
        self.writer = writer
        self.signer = signer
        self.trust = trust
        self.layers = tuple(layers)
        self.local = local
        self.clock = clock
        self._publish = publish or partial(publish_pack_then_commit, clock=clock)

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
            path = commits.pack_path(self.clock.new_id())
            data, found = build_pack(path, batch)
            rows = [(new, entry) for entry in found for new in groups[entry.key]]
            identifier = self.publish(
                Blob(path=path, data=data), commits.write_commit(rows, self.writer)
            )
            placed |= {entry.key: replace(entry, commit=identifier) for entry in found}
        return [placed[entry.key] for entry in entries]

    def publish(self, pack: Blob, rows: bytes) -> str:
        """Writes a pack, and then the commit that makes its entries exist; returns the commit's id."""
        identifier = self.clock.new_id()
        path = file_path(commits.COMMITS, identifier, rows, self.signer)
        self._publish(self.store, pack, Blob(path=path, data=rows))
        return identifier

    def index(self, exclude: Mapping[str, Collection[str]] | None = None) -> CacheIndex:
        """Everything committed so far, here and in the layers below.

        One LIST of commits, then one read a commit that no snapshot holds, many at a time.
        `exclude` gives for the URL of a store the commits (paths) to pass over, because they are being deleted.
        """
        skip = exclude or {}
        below = [
            load_index(store, self.trust, exclude=skip.get(store.url, ()), layer=store.url)
            for store in self.layers
        ]
        own = skip.get(self.store.url, ())
        return load_index(self.store, self.trust, exclude=own, below=below)

    def read(self, entries: Sequence[Entry]) -> list[dict[str, Array]]:
        """The arrays of each entry, in the order given, every one checked against its digest; copy to change one.

        Ranges of a pack are coalesced, and packs are read side by side. Raises CorruptEntry, and
        returns nothing, when one is not what was committed.
        """
        found, bad = self.read_each(entries)
        for error in bad.values():
            raise error
        return [arrays for arrays in found if arrays is not None]

    def read_each(
        self, entries: Sequence[Entry]
    ) -> tuple[list[dict[str, Array] | None], dict[int, CorruptEntry]]:
        """As `read`, but a bad entry is None, and its position leads to what is wrong with it."""
        found: list[dict[str, Array] | None] = [None] * len(entries)
        bad: dict[int, CorruptEntry] = {}
        rest: dict[str, list[int]] = {}
        kept = self.local.get(entries) if self.local else {}
        for position, entry in enumerate(entries):
            # Taken out: arrays share its memory, and each caller's are its own.
            data = kept.pop(entry.blake3, None)
            if data is not None:
                try:
                    found[position] = open_entry(entry, data)
                    continue
                except CorruptEntry:
                    assert self.local is not None
                    self.local.drop(entry)
            rest.setdefault(entry.layer, []).append(position)
        for layer, positions in rest.items():
            if not self.reads(layer):
                for position in positions:
                    bad[position] = CorruptEntry(
                        f"entry {entries[position].key} is not to be had: {_not_read(layer)}"
                    )
                continue
            store = self.store_of(layer)
            fetched = _fetch(store, [entries[position] for position in positions])
            for position, opened in zip(positions, fetched, strict=True):
                if isinstance(opened, CorruptEntry):
                    bad[position] = opened
                    continue
                found[position], stored = opened
                if self.local:
                    self.local.put(entries[position], stored)
        return found, bad

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[FileName, Any]]:
        """(name, pyarrow table of these columns) of every usable commit of this cache, in the order of their ids."""
        skipped: dict[str, str] = {}
        names = list_trusted(self.store, self.trust, commits.COMMITS, skipped)
        for name, data in read_trusted(self.store, self.trust, names, skipped):
            try:
                yield name, commits.read_commit(data, columns)
            except commits.UnusableCommit:
                continue

    def store_of(self, layer: str) -> Store:
        """The store of a layer, "" for the cache's own. Raises ValueError for one that it does not read."""
        if not layer or layer == self.store.url:
            return self.store
        for store in self.layers:
            if store.url == layer:
                return store
        raise ValueError(_not_read(layer))

    def reads(self, layer: str) -> bool:
        """Whether this cache reads the store of that URL, "" for its own."""
        return layer in ("", self.store.url, *(store.url for store in self.layers))


def load_index(
    store: Store,
    trust: Trust = EVERYONE,
    *,
    exclude: Collection[str] = (),
    layer: str = "",
    below: Sequence[CacheIndex] = (),
    with_snapshots: bool = True,
) -> CacheIndex:
    """The index of one store. Commits that cannot be used, or are not trusted, are in its `skipped_commits`.

    `with_snapshots=False` reads every commit itself: for whoever decides what is deleted.
    """
    # Quarantine before commits: an entry that was taken back and committed anew in between is then seen as new.
    bad = [(entry.key, entry.commit) for _, entry in read_quarantine(store, trust)]
    skipped: dict[str, str] = {}
    builder = IndexBuilder(layer)
    excluded = set(exclude)
    names = [
        name
        for name in list_trusted(store, trust, commits.COMMITS, skipped)
        if name.path not in excluded
    ]
    held: set[str] = set()
    if with_snapshots:
        for table in snapshots.read_snapshots(store, trust, {n.identifier for n in names}):
            try:
                builder.add(table)
            except commits.UnusableCommit:
                continue  # its commits are read one by one, and the bad one among them is told
            held.update(table.column("commit").unique().to_pylist())
    # By path, not by id: a file of the same id, whoever put it there, must not hide the real one.
    loose = [name for name in names if name.identifier not in held]
    for name, data in read_trusted(store, trust, loose, skipped):
        try:
            builder.add(with_commit(commits.read_commit(data), name.identifier))
        except commits.UnusableCommit as error:
            skipped[name.path] = error.reason
    return builder.build(skipped=skipped, quarantined=bad, below=below, loose_commits=len(loose))


def _not_read(layer: str) -> str:
    return (
        f"its features lay in {layer}, which this job does not read: add it to cache.read_through of the spec, or run "
        "the preprocess job again"
    )


Opened = tuple[dict[str, Array], memoryview]
"""Arrays of an entry, and the bytes that they were made of."""


def _fetch(store: Store, entries: Sequence[Entry]) -> list[Opened | CorruptEntry]:
    """The arrays of each entry of one store, or why there are none."""
    wanted: dict[str, list[Range]] = {}
    numbers: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        wanted.setdefault(entry.pack, []).append((entry.offset, entry.length))
        numbers.setdefault(entry.pack, []).append(number)
    found: dict[int, Opened | CorruptEntry] = {}

    def check(pack: str, position: int, data: memoryview) -> None:
        # In the thread that read it, so that hashing and reading overlap.
        number = numbers[pack][position]
        found[number] = _opened(entries[number], data)

    try:
        store.read_many(wanted, check)
        return [found[number] for number in range(len(entries))]
    except (FileNotFoundError, ShortRead, ValueError):
        # One of many: each is asked for by itself, to name the bad ones and save the others.
        return [_fetch_one(store, entry) for entry in entries]


def _fetch_one(store: Store, entry: Entry) -> Opened | CorruptEntry:
    try:
        (data,) = store.read_ranges(entry.pack, [(entry.offset, entry.length)])
    except (FileNotFoundError, ShortRead, ValueError) as error:
        return CorruptEntry(
            f"entry {entry.key} at byte {entry.offset} of {entry.pack}: {error}; {remedy(entry)}"
        )
    return _opened(entry, data)


def _opened(entry: Entry, data: memoryview) -> Opened | CorruptEntry:
    try:
        return open_entry(entry, data), data
    except CorruptEntry as error:
        return error


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
