"""Features by name, as training reads them: through a manifest, checked, nothing computed.

Where a manifest says that features lie is a hint: they may have been moved into a larger pack, their
first copy may have been damaged and computed anew, or the manifest may name another team's cache
as the job called it that wrote it. Their key and digest are what counts. So when the place is
wrong, the reader looks the key up and takes a copy with the same digest.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest
from crab_platform.index import CacheIndex
from crab_platform.packs import Array, CorruptEntry, Entry
from crab_platform.quarantine import CORRUPT, bad_entry, write_quarantine
from crab_platform.storage import StoreError

RELOAD_S = 60.0
"""An index that was loaded less than this ago is not loaded again for one more entry that has moved."""


class ManifestReader:
    """Reads the features of one manifest. Safe among threads."""

    def __init__(self, cache: FeatureCache, manifest: Manifest) -> None:
        self.cache = cache
        self.manifest = manifest
        self._index: CacheIndex | None = None
        """Loaded when a place was wrong for the first time; asked for every entry from then on."""
        self._loaded_s = 0.0
        self._told: dict[tuple[str, str], str] = {}
        """(key, commit) -> what was done about this damaged entry; the index may be older than that."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[ManifestReader], tuple[FeatureCache, Manifest]]:
        return (ManifestReader, (self.cache, self.manifest))

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Array]]:
        """Arrays of each (source, stream), in the order given.

        Raises ValueError for a pair that the manifest does not have or has set aside, CorruptEntry
        when there is no sound copy of what was committed; it is in quarantine then, where we may
        write.
        """
        entries = self._placed([self._entry(source, stream) for source, stream in pairs])
        found, bad = self.cache.read_each(entries)
        for position, error in bad.items():
            found[position] = self._elsewhere(entries[position], error)
        return [arrays for arrays in found if arrays is not None]

    def _entry(self, source: str, stream: str) -> Entry:
        row = self.manifest.row(source, stream)
        if row.entry is None:
            raise ValueError(
                f"stream {stream!r} of source {source!r} was set aside ({row.reason}): "
                f"{row.detail or 'no detail'}; leave out its samples"
            )
        return row.entry

    def _placed(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries where the index has them, once there is one."""
        if self._index is None:
            return list(entries)
        known = self._index.lookup([entry.key for entry in entries])
        return [
            now if (now := known.get(entry.key, entry)).blake3 == entry.blake3 else entry
            for entry in entries
        ]

    def _elsewhere(self, entry: Entry, error: CorruptEntry) -> dict[str, Array]:
        """The arrays of an entry from another of its places. Raises CorruptEntry when there is none."""
        others = [copy for copy in self._copies(entry) if _place(copy) != _place(entry)]
        # The place itself once more, last: what went wrong may have been the network.
        for copy in [*others, entry]:
            found, bad = self.cache.read_each([copy])
            if not bad and found[0] is not None:
                return found[0]
            if copy is not entry:
                self._take_back(copy, str(bad[0]))
        if not self.cache.reads(entry.layer):
            raise CorruptEntry(f"{error}. There is no other copy") from error
        told = self._take_back(entry, str(error))
        raise CorruptEntry(
            f"{error}. There is no other copy{told}. Run the preprocess job of this manifest again: it computes only "
            "what is lacking; then start the same command again"
        ) from error

    def _copies(self, entry: Entry) -> list[Entry]:
        """Where the same features lie, by an index that may be old as long as it knows another place."""
        if self._index is not None:
            found = _same(self._index, entry)
            if any(_place(copy) != _place(entry) for copy in found):
                return found
        return _same(self._recent(), entry)

    def _recent(self) -> CacheIndex:
        """An index that was loaded less than RELOAD_S ago."""
        with self._lock:
            is_old = self.cache.clock.monotonic() - self._loaded_s >= RELOAD_S
            if self._index is None or is_old:
                self._index = self.cache.index()
                self._loaded_s = self.cache.clock.monotonic()
            return self._index

    def _take_back(self, entry: Entry, detail: str) -> str:
        name = (entry.key, entry.commit)
        if name not in self._told:
            self._told[name] = take_back(self.cache, entry, detail, self._recent())
        return self._told[name]


def take_back(
    cache: FeatureCache, entry: Entry, detail: str, index: CacheIndex | None = None
) -> str:
    """Puts a damaged entry into quarantine where we may; says in words what was done.

    `index` says what is not in quarantine yet: an old one costs no more than a file that says it twice.
    """
    if entry.layer or not entry.commit or (cache.trust.zones and cache.signer is None):
        return "; its owners must take it back (crab cache verify --quarantine)"
    index = cache.index() if index is None else index
    held = [copy.commit for copy in index.copies(entry.key)]
    if entry.commit not in held:
        return ""  # taken back already, or deleted
    try:
        write_quarantine(
            cache.store,
            [bad_entry(entry, CORRUPT, detail)],
            signer=cache.signer,
            clock=cache.clock,
        )
    except StoreError as error:
        return f"; it could not be put into quarantine ({error})"
    return "; it is in quarantine now"


def _same(index: CacheIndex, entry: Entry) -> list[Entry]:
    return [copy for copy in index.copies(entry.key) if copy.blake3 == entry.blake3]


def _place(entry: Entry) -> tuple[str, str, int]:
    return (entry.layer, entry.pack, entry.offset)
