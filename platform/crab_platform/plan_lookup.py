"""The first pass of a plan: what can be said of clips from the index alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crab_platform.explain import NO_MEDIA, Ints, digest_bytes, text_word
from crab_platform.index import CacheIndex
from crab_platform.plan_table import Column, Group, Groups, Table
from crab_platform.work import Work

QUARANTINED = "in_quarantine"
SET_ASIDE_BEFORE = "set_aside_before"
UNREADABLE = ("not_found", "unreachable")
"""Why a file was set aside without a look at its bytes: says nothing of it now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A file to plan for, as far as it is known without reading it."""

    name: str
    url: str
    streams: tuple[str, ...]
    version: str | None = None
    """As in `source.versions`."""
    sha256: str = ""
    """Of its bytes, where somebody hashed them; else it is looked up by URL and version."""
    num_bytes: int | None = None
    problem: str = ""
    """Why it cannot be read, one of UNREADABLE."""


HashClips = Callable[[Sequence[Clip]], Sequence[Clip]]
"""The same clips with `sha256`, or with a `problem`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aside:
    """A stream that the last run of the job set aside."""

    media_sha256: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Todo:
    """What is to be computed of one stream."""

    encode: int
    """Entries to encode, at most: files that must be hashed first may turn out to be known."""
    decode: int
    """How many of them are decoded as well."""


class Lookup:
    """Takes clips, chunk by chunk, and says of each stream whether it is a hit, and of some why not."""

    def __init__(
        self,
        work: Work,
        index: CacheIndex,
        *,
        bad: Mapping[str, str],
        before: Mapping[tuple[str, str], Aside],
        limit: int,
        hash_clips: HashClips | None = None,
    ) -> None:
        """`bad`: key in quarantine -> why; `before`: (name, stream) -> why the last run set it aside."""
        self._hash_clips = hash_clips
        self._work, self._bad, self._before, self._limit = work, bad, before, limit
        self._index: CacheIndex | None = index
        self._names = list(work.streams)
        self._number = {name: number for number, name in enumerate(self._names)}
        self._groups = Groups()
        self._columns = {
            "counts": Column(np.empty(0, np.int16)),
            "stream": Column(np.empty(0, np.int16)),
            "group": Column(np.empty(0, np.int32)),
            "kept": Column(np.empty(0, bool)),
            "media": Column(np.empty((0, 32), np.uint8)),
            "known": Column(np.empty(0, bool)),
            "url": Column(np.empty(0, np.uint64)),
            "version": Column(np.empty(0, np.uint64)),
        }
        self._encode, self._decode = Counter[str](), Counter[str]()
        self._asked: set[str] = set()
        self._num_sampled = 0
        self.sampled: list[tuple[int, str]] = []
        """(number, name) of the first clips that are not all hits."""
        self.clips = self.to_read = self.bytes_to_read = self.size_unknown = self.to_hash = 0
        self.decode_s = self.encode_s = 0.0
        """What the hits cost when they were made."""

    def add(self, chunk: Sequence[Clip]) -> None:
        """The next clips. Raises ValueError for a stream that the work does not have."""
        assert self._index is not None
        shas = _known_media(self._index, chunk)
        unknown = [n for n, clip in enumerate(chunk) if not shas[n] and not clip.problem]
        if self._hash_clips and unknown:
            chunk = list(chunk)
            for n, clip in zip(unknown, self._hash_clips([chunk[n] for n in unknown]), strict=True):
                chunk[n], shas[n] = clip, clip.sha256
        starts = np.cumsum([0, *(len(clip.streams) for clip in chunk)])
        stream = np.zeros(int(starts[-1]), np.int16)
        group = np.full(len(stream), -1, np.int32)
        kept = np.zeros(len(stream), bool)
        asked: dict[str, list[tuple[int, int]]] = {}
        for number, clip in enumerate(chunk):
            for row, name in enumerate(clip.streams, int(starts[number])):
                if name not in self._number:
                    raise ValueError(
                        f"source {clip.name} wants the stream {name!r}; this job knows {sorted(self._number)}"
                    )
                stream[row] = self._number[name]
                if clip.problem:
                    group[row] = self._aside(name, clip.problem)
                elif shas[number]:
                    asked.setdefault(name, []).append((row, number))
                else:
                    # By its name alone. Hashing the file would make sure that it is the same.
                    group[row] = self._before_or_open(clip.name, name, "")
        for name, places in asked.items():
            self._ask(name, places, chunk, shas, group, kept)
        self._count(chunk, shas, starts, stream, group, kept)
        self._columns["counts"].add(np.diff(starts))
        self._columns["stream"].add(stream)
        self._columns["group"].add(group)
        self._columns["kept"].add(kept)
        self._columns["media"].add(digest_bytes([sha256 or NO_MEDIA for sha256 in shas]))
        self._columns["known"].add(np.asarray([bool(sha256) for sha256 in shas], bool))
        # Where URL and version told the media, nobody asks what else is known of the URL.
        asks = [
            not clip.problem and (not sha or bool(clip.sha256))
            for sha, clip in zip(shas, chunk, strict=True)
        ]
        for column in ("url", "version"):
            texts = (getattr(clip, column) or "" for clip in chunk)
            words = [text_word(text) if ask else 0 for ask, text in zip(asks, texts, strict=True)]
            self._columns[column].add(np.asarray(words, np.uint64))
        self.clips += len(chunk)

    def finish(self) -> Table:
        """All of it; the index is let go, and no more clips can be added."""
        self._index = None
        columns = {name: column.whole() for name, column in self._columns.items()}
        return Table(stream_names=self._names, groups=self._groups, **columns)

    def todo(self) -> dict[str, Todo]:
        """By stream, of those that any clip has."""
        return {
            name: Todo(encode=self._encode[name], decode=self._decode[name])
            for name in self._names
            if name in self._asked
        }

    def _ask(
        self,
        stream: str,
        places: Sequence[tuple[int, int]],
        chunk: Sequence[Clip],
        shas: Sequence[str],
        group: Ints,
        kept: Ints,
    ) -> None:
        """One stream of the clips whose media is known; `places` are (row, number in the chunk)."""
        assert self._index is not None
        digests = [shas[number] for _, number in places]
        keys = self._work.key_digests(stream, digests)
        held = self._index.holds(keys)
        rows = np.asarray([row for row, _ in places])
        group[rows[held]] = self._groups.of(Group(stream=stream, status="hit", reason="hit"))
        hits = np.flatnonzero(held).tolist()
        if hits:
            decode_s, encode_s = self._index.cost([keys[n] for n in hits])
            self.decode_s += decode_s
            self.encode_s += encode_s
        missing = np.flatnonzero(~held).tolist()
        if not missing:
            return
        windows = self._work.decoded_digests(stream, [digests[n] for n in missing])
        kept[rows[missing]] = self._index.holds(windows)
        for n in missing:
            if keys[n] in self._bad:
                why = self._bad[keys[n]]
                bad = Group(stream=stream, status="miss", reason=QUARANTINED, detail=why)
                group[rows[n]] = self._groups.of(bad)
            elif self._before:
                name = chunk[places[n][1]].name
                group[rows[n]] = self._before_or_open(name, stream, digests[n])

    def _before_or_open(self, name: str, stream: str, sha256: str) -> int:
        """The group of a stream that the last run set aside, -1 for another."""
        aside = self._before.get((name, stream))
        if aside is None or aside.reason in UNREADABLE or (sha256 and aside.media_sha256 != sha256):
            return -1
        return self._aside(stream, SET_ASIDE_BEFORE, aside.reason)

    def _aside(self, stream: str, reason: str, detail: str = "") -> int:
        return self._groups.of(
            Group(stream=stream, status="set_aside", reason=reason, detail=detail)
        )

    def _count(
        self,
        chunk: Sequence[Clip],
        shas: Sequence[str],
        starts: Ints,
        stream: Ints,
        group: Ints,
        kept: Ints,
    ) -> None:
        """What is to be read and computed of a chunk."""
        todo = (group < 0) | self._groups.with_status(group, "miss")
        for number, name in enumerate(self._names):
            mine = stream == number
            if mine.any():
                self._asked.add(name)
                self._encode[name] += int(np.count_nonzero(mine & todo))
                self._decode[name] += int(np.count_nonzero(mine & todo & ~kept))
        no_hit = ~self._groups.with_status(group, "hit")
        clip_of = np.repeat(np.arange(len(chunk)), np.diff(starts))
        lacking = np.bincount(clip_of[no_hit], minlength=len(chunk))
        for number in np.flatnonzero(lacking).tolist():
            clip = chunk[number]
            if self._num_sampled < self._limit:
                self.sampled.append((self.clips + number, clip.name))
                self._num_sampled += int(lacking[number])
            if clip.problem:
                continue
            self.to_read += 1
            self.to_hash += not shas[number]
            self.bytes_to_read += clip.num_bytes or 0
            self.size_unknown += clip.num_bytes is None


def _known_media(index: CacheIndex, chunk: Sequence[Clip]) -> list[str]:
    """The SHA-256 of each, "" where it is not known."""
    shas = [clip.sha256 for clip in chunk]
    unknown = [n for n, clip in enumerate(chunk) if not clip.sha256 and not clip.problem]
    found = index.known_media([(chunk[n].url, chunk[n].version) for n in unknown])
    for n, sha256 in zip(unknown, found, strict=True):
        shas[n] = sha256 or ""
    return shas
