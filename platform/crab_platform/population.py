"""Population based training: trials that go on from the best of those before them, with other values.

Jaderberg et al., Population Based Training of Neural Networks, 2017 (arXiv:1711.09846). A member's way is cut into
pieces; each piece is a trial of the journal, and its sample says which one it goes on from. The pieces that begin at
the same step are a generation. The next one is a function of the seed and of what this one has shown, so there is no
state beside the journal, and a sweep that was killed goes on as if it had not been. For that a generation waits for its
slowest member, which the paper's do not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from crab_platform.identity import digest
from crab_platform.search import Mode, Propose, Sample
from crab_platform.trial import PARENT
from crab_platform.trial_journal import TrialRecord

QUANTILE = 0.25
"""Of a generation so many are left behind, and as many gone on from."""
FACTORS = 0.8, 1.2
"""A value is multiplied by one of them; both are the paper's."""
RESAMPLED = 0.25
"""So often a value is drawn anew instead. Ray Tune's default."""


@dataclass(frozen=True, kw_only=True)
class PopulationProposals:
    """Samples of a population. Of its members the worst quarter goes on from one of the best quarter, from its weights,
    with its values changed a little; all others go on as they are. Picklable."""

    draw: Propose
    """The first generation's samples, and values that are drawn anew."""
    size: int
    """Members, at least two."""
    space: Mapping[str, BaseDistribution]
    kept: frozenset[str]
    """Parameters that go with the weights and never change, as they decide their shapes."""
    metric: str
    mode: Mode
    seed: int

    def __call__(self, number: int, known: Sequence[TrialRecord]) -> Sample | None:
        *older, last = generations(known) or [[]]
        if len(last) == self.size:
            if any(record.end is None for record in last):
                return None
            older, last = [last], []
        if not older:
            return self.draw(number, ())
        return self._next(number, len(last), older[-1])

    def _next(self, number: int, place: int, before: Sequence[TrialRecord]) -> Sample | None:
        """The sample of the member at this place, after the generation `before`."""
        sign = 1 if self.mode == "min" else -1
        worth = {record.number: sign * self._last(record) for record in before}
        done = sorted(
            (record for record in before if math.isfinite(worth[record.number])),
            key=lambda record: worth[record.number],
        )
        if not done:
            return None
        count = max(1, int(self.size * QUANTILE))
        best, good = done[:count], done[: max(1, self.size - count)]
        member = before[place]
        if member in good:
            return {**member.config, PARENT: member.number}
        chance = random.Random(digest({"seed": self.seed, "number": number}))
        parent = chance.choice(best)
        return {**self._changed(number, parent.config, chance), PARENT: parent.number}

    def _last(self, record: TrialRecord) -> float:
        if record.status != "completed":
            return math.inf
        return record.results[-1].metrics.get(self.metric, math.inf)

    def _changed(self, number: int, config: Sample, chance: random.Random) -> dict[str, Any]:
        """Jaderberg's explore: values that are not far, and here and there one from anywhere."""
        anew = self.draw(number, ())
        assert anew is not None
        found = dict(config)
        for name, distribution in self.space.items():
            if name in self.kept or name not in config:
                continue
            if chance.random() < RESAMPLED:
                found[name] = anew[name]
            elif isinstance(distribution, FloatDistribution | IntDistribution):
                found[name] = _near(distribution, config[name], chance.choice(FACTORS))
        return found


@dataclass(frozen=True, kw_only=True)
class ReplayProposals:
    """Samples that change on the way as it is written down, each member by itself. Picklable."""

    members: Sequence[Sequence[Sample]]
    """For each member the samples of its pieces; all have as many."""

    def __call__(self, number: int, known: Sequence[TrialRecord]) -> Sample | None:
        *older, last = generations(known) or [[]]
        if not older and len(last) < len(self.members):
            return self.members[len(last)][0]
        wanted = len(_completed(older[-1])) if older else len(self.members)
        if len(last) == wanted:
            if any(record.end is None for record in last):
                return None
            older, last = [*older, last], []
        alive = _completed(older[-1])
        if not alive or len(older) == len(self.members[0]):
            return None
        parent = alive[len(last)]
        return {**self.members[self._member(parent, known)][len(older)], PARENT: parent.number}

    def _member(self, record: TrialRecord, known: Sequence[TrialRecord]) -> int:
        first = lineage(record, known)[0]
        return generations(known)[0].index(first)


def generations(known: Sequence[TrialRecord]) -> list[list[TrialRecord]]:
    """Trials by how many there are before them on their way, each generation by number; refused ones are left out."""
    depth: dict[int, int] = {}
    found: list[list[TrialRecord]] = []
    for record in sorted(known, key=lambda record: record.number):
        if record.status == "refused":
            continue
        parent = record.config.get(PARENT)
        depth[record.number] = 0 if parent is None else depth[parent] + 1
        while len(found) <= depth[record.number]:
            found.append([])
        found[depth[record.number]].append(record)
    return found


def lineage(record: TrialRecord, known: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials on whose weights this one has built, the first one first, itself last."""
    by_number = {other.number: other for other in known}
    found = [record]
    while (parent := found[0].config.get(PARENT)) is not None:
        found.insert(0, by_number[parent])
    return found


def unneeded(size: int) -> Callable[[Sequence[TrialRecord]], list[int]]:
    """Which trials nobody will go on from any more, given all that there are: those of a generation whose next one is
    complete and has ended."""

    def find(known: Sequence[TrialRecord]) -> list[int]:
        found = generations(known)
        return [
            record.number
            for before, after in pairwise(found)
            if len(after) == size and all(record.end is not None for record in after)
            for record in before
        ]

    return find


def _completed(generation: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in generation if record.status == "completed"]


def _near(
    distribution: FloatDistribution | IntDistribution, value: float, factor: float
) -> float | int:
    """The value times the factor, where the distribution has one; whole numbers move by one at least."""
    wanted = value * factor
    if isinstance(distribution, IntDistribution):
        wanted = math.ceil(wanted) if factor > 1 else math.floor(wanted)
    if distribution.step is not None:
        steps = round((wanted - distribution.low) / distribution.step)
        wanted = distribution.low + steps * distribution.step
    return min(max(wanted, distribution.low), distribution.high)
