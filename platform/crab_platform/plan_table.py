"""The streams of all clips of a plan, as columns: a million clips in tens of megabytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crab_platform.explain import Differences, Ints, Origin

Status = Literal["hit", "miss", "set_aside"]

_ORDER: Mapping[Status, int] = {"miss": 0, "set_aside": 1, "hit": 2}


@dataclass(frozen=True, kw_only=True)
class Group:
    """A fate that streams of clips share, and its reason."""

    stream: str
    """Name of the stream in the job."""
    status: Status
    reason: str
    detail: str = ""
    fields: Differences = ()
    """How the nearest earlier key differs: (field, earlier, wanted)."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """How many meet it, and of which earlier runs it speaks."""

    group: Group
    count: int
    origins: tuple[tuple[Origin, int], ...]
    """One a run, with how often; its commit is the last of that run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What becomes of one stream of one clip."""

    name: str
    group: Group
    media_sha256: str
    """"" where the file would have to be read to know it."""
    origin: Origin | None
    """The earlier run that the reason speaks of."""
    decoded_kept: bool
    """Whether its decoded windows are in the cache, so that a miss costs no decoding."""


class Groups:
    """Groups, each once, by number."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._number: dict[str, int] = {}

    def of(self, group: Group) -> int:
        """The number of a group. By its text: values of fields may be lists."""
        text = repr(group)
        if text not in self._number:
            self._number[text] = len(self.groups)
            self.groups.append(group)
        return self._number[text]

    def with_status(self, numbers: Ints, status: Status) -> Ints:
        """(n,) of bool: which of these numbers are of that status; -1 is of none."""
        known = np.asarray([group.status == status for group in self.groups] + [False], bool)
        found: Ints = known[numbers]
        return found


class Column:
    """An array that grows by pieces."""

    def __init__(self, empty: Ints) -> None:
        self._parts = [empty]

    def add(self, part: Ints) -> None:
        """Appends it, as the type of the whole."""
        self._parts.append(part.astype(self._parts[0].dtype))

    def whole(self) -> Ints:
        """All of it; the pieces are let go."""
        parts, self._parts = self._parts, []
        return np.concatenate(parts)


@dataclass(kw_only=True)
class Table:
    """Every stream of every clip. n clips, m streams of clips."""

    stream_names: list[str]
    groups: Groups
    counts: Ints
    """(n,) streams of each clip."""
    stream: Ints
    """(m,) numbers in `stream_names`."""
    group: Ints
    """(m,) -1 while it is not known why it is a miss."""
    kept: Ints
    """(m,) whether decoded windows are in the cache."""
    media: Ints
    """(n, 32) bytes."""
    known: Ints
    """(n,) whether the media is known."""
    url: Ints
    """(n,) `text_word` of the URL where it did not tell the media, else 0."""
    version: Ints
    """(n,) the same of its version."""

    def __post_init__(self) -> None:
        self._starts = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        self.origin = np.full(len(self.group), -1, np.int32)
        """(m,) numbers in `origins`, -1 for none."""
        self.origins: list[Origin] = []

    def open_rows(self) -> Ints:
        """Rows that are not explained yet."""
        return np.flatnonzero(self.group < 0)

    def clip_of(self, rows: Ints) -> Ints:
        """The clip of each row."""
        found: Ints = np.searchsorted(self._starts, rows, "right") - 1
        return found

    def counted(self) -> tuple[Counted, ...]:
        """Misses first, and the most frequent first among them."""
        width = len(self.origins) + 1
        pairs, numbers = np.unique(
            self.group.astype(np.int64) * width + self.origin + 1, return_counts=True
        )
        counts: Counter[int] = Counter()
        runs: dict[int, dict[tuple[str, ...], tuple[Origin, int]]] = {}
        for pair, count in zip(pairs.tolist(), numbers.tolist(), strict=True):
            group, origin = divmod(pair, width)
            counts[group] += count
            if origin:
                one = self.origins[origin - 1]
                run = (one.run, one.experiment, one.team, one.layer)
                last, so_far = runs.setdefault(group, {}).get(run, (one, 0))
                later = max(last, one, key=lambda origin: origin.commit)
                runs[group][run] = (later, so_far + count)
        found = [
            Counted(
                group=self.groups.groups[number],
                count=count,
                origins=tuple(
                    sorted(runs.get(number, {}).values(), key=lambda p: (-p[1], p[0].commit))
                ),
            )
            for number, count in counts.items()
        ]
        return tuple(
            sorted(found, key=lambda c: (_ORDER[c.group.status], -c.count, c.group.stream))
        )

    def of_clip(self, number: int, name: str) -> Iterator[Outcome]:
        """The streams of one clip."""
        sha256 = self.media[number].tobytes().hex() if self.known[number] else ""
        for row in range(int(self._starts[number]), int(self._starts[number + 1])):
            origin = int(self.origin[row])
            yield Outcome(
                name=name,
                group=self.groups.groups[int(self.group[row])],
                media_sha256=sha256,
                origin=self.origins[origin] if origin >= 0 else None,
                decoded_kept=bool(self.kept[row]),
            )

    def outcomes(self, names: Iterable[str]) -> Iterator[Outcome]:
        """Every stream of every clip; `names` in the order in which the clips were looked up."""
        for number, name in enumerate(names):
            yield from self.of_clip(number, name)
