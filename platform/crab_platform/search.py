"""Which sample a sweep tries next, by Optuna; asked again after a kill, it gives what it gave before.

Sample number n is a function of the seed, n and what the trials before it have shown so far: Optuna's sampler is made
anew for each, with a seed of its own, and is told what is known. So there is no state to save. The samples that were
given are in the journal, and are given again first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from crab_platform.identity import digest
from crab_platform.storage import Store
from crab_platform.trial import AVOID, NUMBER
from crab_platform.trial_journal import TrialJournal, TrialRecord, now, read_trial, read_trials

_LOG = logging.getLogger(__name__)
Sample = Mapping[str, Any]
Mode = Literal["min", "max"]
Propose = Callable[[int, Sequence[TrialRecord]], Sample | None]
"""(number, the trials so far) -> the sample of that number, or None where one of them has to end first."""
REFUSED_IN_A_ROW = 20
"""So many impossible samples one after the other say that the space is wrong."""
NUM_RANDOM = 10
"""Samples before the model of Optuna's TPE is asked; its own default."""


@dataclass(frozen=True, kw_only=True)
class OptunaProposals:
    """Samples of a space, by Optuna's TPE or at random. Picklable."""

    space: Mapping[str, BaseDistribution]
    searcher: Literal["optuna", "random"]
    metric: str
    mode: Mode
    seed: int
    first: Sequence[Sample] = ()
    """Samples that are tried before all others."""

    def __call__(self, number: int, known: Sequence[TrialRecord]) -> Sample:
        if number < len(self.first):
            return self.first[number]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="minimize" if self.mode == "min" else "maximize",
            sampler=self._sampler(number),
        )
        if self.searcher == "optuna":
            study.add_trials([told for record in known if (told := self._told(record))])
        return study.ask(dict(self.space)).params

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        # One seed for each number: the same one would draw the same sample again and again.
        seed = int(digest({"seed": self.seed, "number": number})[:8], 16)
        if self.searcher == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=NUM_RANDOM, multivariate=True, constant_liar=True
        )

    def _told(self, record: TrialRecord) -> FrozenTrial | None:
        """A trial as Optuna sees it; None for a sample of `first` that is not of the space. One that was stopped early
        is worth what it had shown by then."""
        shown = {
            result.step: value
            for result in record.results
            if (value := result.metrics.get(self.metric)) is not None and math.isfinite(value)
        }
        state, value = TrialState.RUNNING, None
        if record.status in ("failed", "refused"):
            state = TrialState.FAIL
        elif record.status == "stopped":
            state = TrialState.PRUNED
        elif record.status == "completed":
            value = record.best(self.metric, self.mode)
            state = TrialState.FAIL if value is None else TrialState.COMPLETE
        try:
            return optuna.trial.create_trial(
                state=state,
                value=value,
                params=dict(record.config),
                distributions=dict(self.space),
                intermediate_values=shown,
            )
        except ValueError:  # a value that is outside its distribution, or of a name that has none
            return None


class JournaledSearch(Searcher):
    """What Ray Tune asks. Samples of the journal first, in their order; then `propose`, until there are enough.

    A trial that failed is asked again here, not by Ray Tune: so its failures are counted over restarts of the sweep,
    and it may go to another node.
    """

    def __init__(
        self,
        store: Store,
        propose: Propose,
        *,
        num_samples: int,
        examine: Callable[[Sample], str | None],
        metric: str,
        mode: Mode,
        max_failures: int = 3,
        avoid: Callable[[], list[str]] = list,
    ) -> None:
        """
        Args:
            examine: why a sample cannot be tried, or None. Such samples do not count.
            max_failures: so often a trial is asked again.
            avoid: nodes on which trials are not to be put now.
        """
        super().__init__(metric=metric, mode=mode)
        self._store, self._propose, self._examine = store, propose, examine
        self._num_samples, self._max_failures, self._avoid = num_samples, max_failures, avoid
        self._known = {record.number: record for record in read_trials(store)}
        self._failures = {n: len(record.failures) for n, record in self._known.items()}
        self._old = [r for r in self._known.values() if r.status not in ("refused", "failed")]
        self._retries: list[int] = []
        self._in_flight: dict[str, int] = {}
        # What has failed for good stays so: it is not asked again, and counts.
        self._counted = sum(record.status == "failed" for record in self._known.values())
        self._refused_in_a_row: list[str] = []
        self.refusal: str | None = None
        """Why the space was given up."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial's sample, its number and nodes to avoid; None where one may fail yet and come again."""
        number = self._retries.pop(0) if self._retries else self._new()
        if number is None and self._in_flight:
            return None
        if number is None:
            if self._counted < self._num_samples and self.refusal is None:
                self.refusal = (
                    f"{self._counted} of {self._num_samples} trials were started: those that the others would have "
                    "gone on from have failed"
                )
            return Searcher.FINISHED
        self._in_flight[trial_id] = number
        return {NUMBER: number, AVOID: self._avoid(), **self._known[number].config}

    def _new(self) -> int | None:
        """The number of the next trial that can be tried; None when there are enough, or others have to end first."""
        while self._counted < self._num_samples and self.refusal is None:
            found = self._next()
            if found is None:
                break
            number, sample = found
            reason = self._examine(sample)
            journal = TrialJournal(self._store, number)
            if number not in self._known:
                journal.ask(sample)
                self._known[number] = TrialRecord(number=number, config=sample, asked_at=now())
            if reason is None:
                self._counted += 1
                self._refused_in_a_row.clear()
                return number
            _LOG.warning("sample %d is refused: %s", number, reason)
            journal.finish("refused", reason)
            self._refused_in_a_row.append(reason)
            if len(self._refused_in_a_row) == REFUSED_IN_A_ROW:
                self.refusal = (
                    f"{REFUSED_IN_A_ROW} samples in a row are impossible, the last one: {reason}"
                )
        return None

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        if self._old:
            record = self._old.pop(0)
            return record.number, dict(record.config)
        for number, record in self._known.items():
            if record.end is None:  # of the others all is known
                self._known[number] = read_trial(self._store, number)
        number = 1 + max(self._known, default=-1)
        sample = self._propose(number, list(self._known.values()))
        return None if sample is None else (number, dict(sample))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """What it has shown is in the journal. One that failed is asked again, if it may."""
        number = self._in_flight.pop(trial_id)
        if error:
            self._failures[number] = self._failures.get(number, 0) + 1
            if self._failures[number] <= self._max_failures:
                self._retries.append(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: there is no state beside the journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Never called: a sweep starts anew from its journal."""
        raise NotImplementedError("a sweep is started again from its journal")
