"""What a cache holds, in memory: built from the commits once, then asked without touching the store.

Rows are kept as columns of fixed width (a key is 32 bytes, not a string of 64), sorted by key:
about 200 bytes a row, and a lookup of many keys is one binary search over an array. That is what
makes a million clips fit on a laptop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from crab_platform import commits
from crab_platform.packs import Entry, TensorSpec

Ints = np.ndarray[Any, Any]

_NIBBLE = np.full(256, 255, np.uint8)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _NIBBLE[_digit] = _value


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one commit, or of many, as columns of equal length n."""

    key: Ints
    """(n, 32) bytes."""
    blake3: Ints
    """(n, 32) bytes."""
    media: Ints
    """(n, 32) bytes: SHA-256 of the media."""
    place: Ints
    """(n, 16) bytes: digest of URL and version, zeros where either is unknown."""
    cost: Ints
    """(n, 2): seconds of decoding and of encoding that the entry cost, 0 where unknown."""
    offset: Ints
    length: Ints
    pack: Ints
    """Positions in the list of packs."""
    tensors: Ints
    commit: Ints

    def take(self, rows: Ints) -> Rows:
        """The rows of those numbers, or of a mask."""
        return Rows(**{name: column[rows] for name, column in vars(self).items()})


class Names:
    """Strings that many rows share, each kept once, by number."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._number: dict[str, int] = {}

    def numbers(self, column: Any) -> Ints:
        """The numbers of a column of strings."""
        encoded = column.combine_chunks().dictionary_encode()
        known = [self.number(name) for name in encoded.dictionary.to_pylist()]
        numbers: Ints = np.asarray(known, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)]
        return numbers

    def number(self, name: str) -> int:
        """The number of one string."""
        if name not in self._number:
            self._number[name] = len(self.names)
            self.names.append(name)
        return self._number[name]


class IndexBuilder:
    """Takes commits one after the other, in the order of their ids, and makes an index."""

    def __init__(self, layer: str = "") -> None:
        self._layer = layer
        self._parts: list[Rows] = []
        self._packs, self._tensors, self._commits = Names(), Names(), Names()

    def add(self, table: Any) -> None:
        """Rows with the columns commits.INDEXED and `commit` (an identifier).

        Raises commits.UnusableCommit when a digest is not 64 hex digits; then nothing is added.
        """
        digests = {
            name: _from_hex(table.column(column), column)
            for name, column in (("key", "key"), ("blake3", "blake3"), ("media", "media_sha256"))
        }
        places = zip(
            table.column("source_url").to_pylist(),
            table.column("source_version").to_pylist(),
            strict=True,
        )
        place = b"".join(_place(url, version) for url, version in places)
        try:
            for text in table.column("tensors").unique().to_pylist():
                commits.specs_from_json(text)
        except ValueError as error:
            raise commits.UnusableCommit("commit_unreadable", str(error)) from error
        self._parts.append(
            Rows(
                **digests,
                place=np.frombuffer(place, np.uint8).reshape(-1, 16),
                cost=np.stack(
                    [table.column(name).to_numpy() for name in ("decode_s", "encode_s")], axis=1
                ).astype(np.float32),
                offset=table.column("offset").to_numpy(),
                length=table.column("length").to_numpy(),
                pack=self._packs.numbers(table.column("pack")),
                tensors=self._tensors.numbers(table.column("tensors")),
                commit=self._commits.numbers(table.column("commit")),
            )
        )

    def build(
        self,
        *,
        skipped: dict[str, str] | None = None,
        quarantined: Iterable[tuple[str, str]] = (),
        below: Sequence[CacheIndex] = (),
        loose_commits: int = 0,
    ) -> CacheIndex:
        """The index of all rows but those of (key, commit) pairs in quarantine."""
        rows = Rows(
            **{
                name: np.concatenate([getattr(part, name) for part in self._parts] or [empty])
                for name, empty in _EMPTY.items()
            }
        )
        self._parts.clear()
        pa.default_memory_pool().release_unused()
        # A snapshot and the commits after it come in two sequences; ids give the order of both.
        rank = np.empty(len(self._commits.names), np.int64)
        rank[sorted(range(len(rank)), key=self._commits.names.__getitem__)] = np.arange(len(rank))
        order = np.lexsort((np.arange(len(rows.key)), rank[rows.commit], *_words(rows.key).T[::-1]))
        rows = rows.take(order)
        bad = {(bytes.fromhex(key), self._commits.number(commit)) for key, commit in quarantined}
        if bad:
            numbers = rows.commit.tolist()
            suspects = np.flatnonzero(np.isin(rows.commit, [number for _, number in bad]))
            drop = [n for n in suspects.tolist() if (rows.key[n].tobytes(), numbers[n]) in bad]
            keep = np.ones(len(numbers), bool)
            keep[drop] = False
            rows = rows.take(keep)
        return CacheIndex(
            rows,
            packs=self._packs.names,
            tensors=self._tensors.names,
            commit_ids=self._commits.names,
            layer=self._layer,
            skipped=skipped or {},
            below=below,
            loose_commits=loose_commits,
        )


class CacheIndex:
    """What existed when it was loaded. All answers come from memory.

    Of several entries of a key the one with the smallest commit id counts, which is the earliest.
    Keys that this cache lacks are looked for in the layers below, in their order.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        packs: list[str],
        tensors: list[str],
        commit_ids: list[str],
        layer: str,
        skipped: dict[str, str],
        below: Sequence[CacheIndex],
        loose_commits: int,
    ) -> None:
        """`rows` sorted by key, rows of one key by commit id."""
        self._rows = rows
        self._prefix = np.ascontiguousarray(_words(rows.key)[:, 0])
        self._packs, self._tensors, self._commits = packs, tensors, commit_ids
        self.layer = layer
        self.skipped_commits = skipped
        """Commit files that were not used: path -> reason."""
        self.below = tuple(below)
        self.loose_commits = loose_commits
        """Commits that were read one by one, because no snapshot holds them."""

    @property
    def skipped(self) -> dict[str, int]:
        """How many commit files were not used, by reason."""
        return dict(Counter(self.skipped_commits.values()))

    @cached_property
    def _is_first(self) -> Ints:
        """Which rows are the first of their key."""
        words = _words(self._rows.key)
        first = np.ones(len(words), bool)
        first[1:] = (words[1:] != words[:-1]).any(axis=1)
        return first

    @cached_property
    def duplicates(self) -> int:
        """Rows passed over because an earlier commit has the key."""
        home = self._rows.commit[
            np.maximum.accumulate(np.where(self._is_first, np.arange(len(self._is_first)), 0))
        ]
        return int(np.count_nonzero(self._rows.commit != home))

    @cached_property
    def conflicts(self) -> list[str]:
        """Keys that stand in several commits with different features."""
        at = np.maximum.accumulate(np.where(self._is_first, np.arange(len(self._is_first)), 0))
        other = (self._rows.blake3 != self._rows.blake3[at]).any(axis=1)
        clash = other & (self._rows.commit != self._rows.commit[at])
        return sorted({row.tobytes().hex() for row in self._rows.key[clash]})

    def __len__(self) -> int:
        return int(np.count_nonzero(self._is_first))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self.holds([key])[0])

    def __iter__(self) -> Iterator[str]:
        for row in np.flatnonzero(self._is_first):
            yield self._rows.key[row].tobytes().hex()

    def holds(self, keys: Sequence[str]) -> Ints:
        """Which keys exist, here or in a layer below: (n,) of bool."""
        found = self._find(keys) >= 0
        for layer in self.below:
            found |= layer.holds(keys)
        return found

    def lookup(self, keys: Iterable[str]) -> dict[str, Entry]:
        """The entries of those keys that exist; a key that is not in the answer is a miss."""
        asked = list(dict.fromkeys(keys))
        at = self._find(asked)
        hits = np.flatnonzero(at >= 0)
        names = asked if len(hits) == len(asked) else [asked[n] for n in hits.tolist()]
        found = dict(zip(names, self._entries(names, at[hits]), strict=True))
        if self.below and len(found) < len(asked):
            rest = [key for key in asked if key not in found]
            for layer in self.below:
                found = {**layer.lookup(rest), **found}
                rest = [key for key in rest if key not in found]
        return found

    def cost(self, keys: Sequence[str]) -> tuple[float, float]:
        """Seconds of decoding and of encoding that the entries of those keys that exist cost when they were made."""
        at = self._find(keys)
        decode_s, encode_s = self._rows.cost[at[at >= 0]].sum(axis=0, dtype=np.float64).tolist()
        rest = [key for key, row in zip(keys, at.tolist(), strict=True) if row < 0]
        for layer in self.below if rest else ():
            more = layer.cost(rest)
            decode_s, encode_s = decode_s + more[0], encode_s + more[1]
        return decode_s, encode_s

    def copies(self, key: str) -> list[Entry]:
        """Every entry of a key, the one that counts first."""
        at = int(self._find([key])[0])
        rows = []
        while 0 <= at < len(self._prefix) and self._rows.key[at].tobytes().hex() == key:
            rows.append(at)
            at += 1
        found = self._entries([key] * len(rows), np.asarray(rows, np.int64))
        return found + [entry for layer in self.below for entry in layer.copies(key)]

    def entries(self) -> Iterator[Entry]:
        """Every entry of this cache, winners and duplicates; layers below not."""
        return (entry for entry, _ in self.entries_with_media())

    def entries_with_media(self) -> Iterator[tuple[Entry, str]]:
        """The same with the SHA-256 of the media."""
        for start in range(0, len(self._prefix), 4096):
            rows = np.arange(start, min(start + 4096, len(self._prefix)))
            keys = [key.tobytes().hex() for key in self._rows.key[rows]]
            media = [digest.tobytes().hex() for digest in self._rows.media[rows]]
            yield from zip(self._entries(keys, rows), media, strict=True)

    def known_media(self, places: Sequence[tuple[str, str | None]]) -> list[str | None]:
        """The SHA-256 that each (URL, version) had, where it is known; a version is size with ETag or mtime.

        None as well when commits disagree: then the media must be hashed.
        """
        asked = b"".join(_place(url, version or "") for url, version in places)
        words = _words(np.frombuffer(asked, np.uint8).reshape(-1, 16))
        order, first_word, second_word = self._by_place
        low = np.searchsorted(first_word, words[:, 0], "left")
        high = np.searchsorted(first_word, words[:, 0], "right")
        found: list[str | None] = []
        for (one, two), start, stop in zip(
            words.tolist(), low.tolist(), high.tolist(), strict=True
        ):
            if start == stop or not (one or two):
                found.append(None)
                continue
            rows = order[start:stop][second_word[start:stop] == two]
            digests = {self._rows.media[row].tobytes() for row in rows}
            found.append(digests.pop().hex() if len(digests) == 1 else None)
        for layer in self.below:
            lower = iter(
                layer.known_media([p for p, sha in zip(places, found, strict=True) if not sha])
            )
            found = [sha or next(lower) for sha in found]
        return found

    @cached_property
    def _by_place(self) -> tuple[Ints, Ints, Ints]:
        words = _words(self._rows.place)
        order = np.argsort(words[:, 0], kind="stable")
        return order, words[order, 0], words[order, 1]

    @cached_property
    def _specs(self) -> list[tuple[TensorSpec, ...]]:
        return [commits.specs_from_json(text) for text in self._tensors]

    def _find(self, keys: Sequence[str]) -> Ints:
        """The first row of each key, -1 where there is none."""
        try:
            raw = bytes.fromhex("".join(keys))
        except ValueError:
            raw = b""
        if len(raw) != 32 * len(keys) or not len(self._prefix):
            usable = [len(key) == 64 and _is_hex(key) for key in keys]
            found = np.full(len(keys), -1, np.int64)
            if len(self._prefix) and any(usable):
                found[usable] = self._find([k for k, ok in zip(keys, usable, strict=True) if ok])
            return found
        asked = np.frombuffer(raw, np.uint8).reshape(-1, 32)
        prefix = _words(asked)[:, 0]
        # Sorting what is asked makes the search walk through memory in order: several times faster.
        order = np.argsort(prefix)
        at = np.empty(len(keys), np.int64)
        at[order] = np.searchsorted(self._prefix, prefix[order], "left")
        inside = np.minimum(at, len(self._prefix) - 1)
        equal = (_words(self._rows.key[inside]) == _words(asked)).all(axis=1)
        found = np.where(equal, at, -1)
        # Two keys that share 64 bits: practically never by chance, and cheap to be right about.
        for n in np.flatnonzero(~equal & (self._prefix[inside] == prefix)).tolist():
            stop = int(np.searchsorted(self._prefix, prefix[n], "right"))
            same = (self._rows.key[at[n] : stop] == asked[n]).all(axis=1)
            if same.any():
                found[n] = at[n] + int(np.argmax(same))
        return found

    def _entries(self, keys: Sequence[str], rows: Ints) -> list[Entry]:
        if not len(rows):
            return []
        digests = self._rows.blake3[rows].tobytes().hex()
        columns = zip(
            keys,
            self._rows.pack[rows].tolist(),
            self._rows.offset[rows].tolist(),
            self._rows.length[rows].tolist(),
            range(0, len(digests), 64),
            self._rows.tensors[rows].tolist(),
            self._rows.commit[rows].tolist(),
            strict=True,
        )
        specs = self._specs
        return [
            Entry(
                key=key,
                pack=self._packs[pack],
                offset=offset,
                length=length,
                blake3=digests[at : at + 64],
                tensors=specs[tensors],
                commit=self._commits[commit],
                layer=self.layer,
            )
            for key, pack, offset, length, at, tensors, commit in columns
        ]


_EMPTY: dict[str, Ints] = {
    **{name: np.empty((0, 32), np.uint8) for name in ("key", "blake3", "media")},
    "place": np.empty((0, 16), np.uint8),
    "cost": np.empty((0, 2), np.float32),
    **{name: np.empty(0, np.int64) for name in ("offset", "length")},
    **{name: np.empty(0, np.int32) for name in ("pack", "tensors", "commit")},
}


def _words(digests: Ints) -> Ints:
    """(n, 8k) bytes as (n, k) numbers that sort as the bytes do."""
    width = digests.shape[1] // 8
    return np.ascontiguousarray(digests).view(">u8").astype(np.uint64).reshape(-1, width)


def _place(url: str, version: str) -> bytes:
    if not url or not version:
        return bytes(16)
    return blake2b(f"{url}\0{version}".encode(), digest_size=16).digest()


def _is_hex(text: str) -> bool:
    return not text.strip("0123456789abcdef")


def _from_hex(column: Any, name: str) -> Ints:
    """A column of 64 lower-case hex digits as (n, 32) bytes."""
    array = column.combine_chunks().cast(pa.large_string())
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    if len(array) and (np.diff(bounds) != 64).any():
        raise commits.UnusableCommit("commit_unreadable", f"column {name} has no digests")
    text = (
        np.frombuffer(data or b"", np.uint8)[bounds[0] : bounds[-1]] if len(array) else _NIBBLE[:0]
    )
    nibbles = _NIBBLE[text].reshape(-1, 64)
    if (nibbles == 255).any():
        raise commits.UnusableCommit("commit_unreadable", f"column {name} has no digests")
    return (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
