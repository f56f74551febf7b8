"""The two phases of a sweep: trials are searched, then the best setting and its rivals are trained again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_platform.budget import Budget
from crab_platform.capacity import Need
from crab_platform.catalog import Manifest
from crab_platform.population import (
    PopulationProposals,
    ReplayProposals,
    lineage,
    unneeded,
)
from crab_platform.ray_train_trial import RayTrainTrial
from crab_platform.search import OptunaProposals, Propose, Sample
from crab_platform.storage import open_store
from crab_platform.sweep_tracking import SweepTracking
from crab_platform.tracking import Run
from crab_platform.trial import SessionTrial, TrialPlan
from crab_platform.trial_journal import TrialRecord
from crab_platform.tuning import Sweep, SweepConfig, run_trials
from jobs.output import progress
from jobs.spec import SpecError, TrainSpec, TuneSpec, spec_record
from jobs.sweep_record import WINNER, trial_values
from jobs.train import training_config
from jobs.trial_build import LABEL, SEED, TrialBuild, plain, spec_of
from jobs.trial_spec import examine
from tune_spaces.space import Space

_ADAPTERS = "adapters"


@dataclass(frozen=True, kw_only=True)
class Phases:
    """A sweep that was read and checked."""

    spec: TuneSpec
    space: Space
    manifest: Manifest
    folder: Path
    base: str
    """Digest of the language model."""
    identity: str

    @property
    def need(self) -> Need:
        """What a trial takes."""
        workers = self.spec.train.workers
        return Need(workers=workers.count, cpus=workers.cpus, gpus=1 if workers.gpu else 0)

    def check(self) -> None:
        """Raises SpecError for a sample in the spec that cannot be: nobody should wait for the search to hear of it."""
        for sample in (*self.spec.search.first, *self.spec.confirm.compare.values()):
            if (objection := self._examine(sample)) is not None:
                raise SpecError(f"sample {dict(sample)}: {objection}")
        if self.spec.search.scheduler == "pbt" and not (
            self.space.parameters.keys() - self.space.changes_shapes
        ):
            raise SpecError(
                f"search.scheduler pbt: all parameters of {self.space.name} decide the shapes of weights, so nothing "
                "can change while a model learns; take asha"
            )

    @property
    def _pieces(self) -> int:
        """Into how many trials the way of a member is cut: 1 without a population."""
        interval = self.spec.search.interval
        return math.ceil(self.spec.train.optimisation.steps / interval) if interval else 1

    def search(self, parent: Run, budget: Budget) -> Sweep:
        """All samples, early stopped as the spec says."""
        search = self.spec.search
        space = {name: p.distribution for name, p in self.space.parameters.items()}
        propose: Propose = OptunaProposals(
            space=space,
            searcher=search.searcher,
            metric=search.metric,
            mode=search.mode,
            seed=search.seed,
            first=tuple(search.first),
        )
        if search.scheduler == "pbt":
            propose = PopulationProposals(
                draw=propose,
                size=search.samples,
                space=space,
                kept=self.space.changes_shapes,
                metric=search.metric,
                mode=search.mode,
                seed=search.seed,
            )
        config = SweepConfig(
            mode=search.mode,
            num_samples=search.samples * self._pieces,
            scheduler="fifo" if search.scheduler == "pbt" else search.scheduler,
            grace_steps=search.grace_steps,
            reduction_factor=search.reduction_factor,
            max_failures=search.max_failures,
            max_concurrent=search.max_concurrent,
            need=self.need,
        )
        return self._run("search", config, propose, parent, budget)

    def confirm(
        self, parent: Run, winner: TrialRecord | None, trials: Sequence[TrialRecord], budget: Budget
    ) -> Sweep | None:
        """The winner and what it is compared with, each on every seed, to the end; None without a winner. A winner of
        a population changes its values where it changed them in the search, one of `trials`."""
        if winner is None:
            return None
        confirm = self.spec.confirm
        way = [plain(record.config) for record in lineage(winner, trials)]
        settings = {WINNER: way} | {
            label: [sample] * len(way) for label, sample in confirm.compare.items()
        }
        first = self.spec.train.optimisation.seed
        # Seeds outside, so that a kill leaves something of every setting.
        members = [
            [{LABEL: label, SEED: first + 1 + seed, **sample} for sample in samples]
            for seed in range(confirm.seeds)
            for label, samples in settings.items()
        ]
        config = SweepConfig(
            mode=self.spec.search.mode,
            num_samples=len(members) * len(way),
            scheduler="fifo",
            max_failures=self.spec.search.max_failures,
            max_concurrent=self.spec.search.max_concurrent,
            need=self.need,
        )
        # Another winner, of a search that went on, is confirmed anew.
        phase = f"confirm-{winner.number:05d}"
        return self._run(phase, config, ReplayProposals(members=members), parent, budget)

    def keep_adapter(self, trials: Sequence[TrialRecord]) -> Path | None:
        """The adapter of the winner's best seed, in one place; those of the others are removed."""
        metric, sign = self.spec.search.metric, 1 if self.spec.search.mode == "min" else -1
        done = [
            trial
            for trial in trials
            if trial.config[LABEL] == WINNER
            and trial.status == "completed"
            and trial.steps == self.spec.train.optimisation.steps
        ]
        kept = self.folder / "adapter"
        if not done:
            return None
        best = min(done, key=lambda trial: sign * trial.results[-1].metrics[metric])
        source = self._adapters / f"{best.number:05d}"
        if source.exists():
            shutil.rmtree(kept, ignore_errors=True)
            source.rename(kept)
        shutil.rmtree(self._adapters, ignore_errors=True)
        return kept

    def values(self, trial: TrialRecord, budget: Budget) -> dict[str, Any]:
        """A trial of the search as plain values."""
        search = self.spec.search
        parameters = None
        if trial.status != "refused":
            parameters = examine(self._spec_of(trial.config)).trained_parameters
        return trial_values(trial, search.metric, search.mode, budget, parameters)

    @property
    def _adapters(self) -> Path:
        return self.folder / _ADAPTERS

    def _spec_of(self, sample: Mapping[str, Any]) -> TrainSpec:
        return spec_of(self.spec.train, self.space, sample)

    def _examine(self, sample: Sample) -> str | None:
        try:
            return examine(self._spec_of(sample)).objection
        except SpecError as error:
            return str(error)

    def _run(
        self, phase: str, config: SweepConfig, propose: Propose, parent: Run, budget: Budget
    ) -> Sweep:
        train = self.spec.train
        validation = train.validation
        assert validation is not None  # TuneSpec has seen to it
        url = str(self.folder / phase)
        build = TrialBuild(
            train=train,
            space=self.space,
            manifest=self.manifest,
            adapters=self._adapters,
            lineage={
                "manifest": self.manifest.digest,
                "base_model": self.base,
                "identity": self.identity,
                "mlflow_run": parent.run_id,
            },
        )
        plan = TrialPlan(
            url=url,
            build=build,
            training=training_config(train, self.folder),
            metric=self.spec.search.metric,
            num_steps=train.optimisation.steps,
            report_every=validation.every,
            piece_steps=self.spec.search.interval,
            exports=config.scheduler == "fifo" and phase.startswith("confirm"),
        )
        tracked = SweepTracking(
            parent,
            open_store(url),
            identity=f"{self.identity}-{phase}",
            folder=self.folder / phase / "spools",
            spec_of=lambda sample: {"sample": dict(sample), **spec_record(self._spec_of(sample))},
            name_of=lambda record: f"{self.spec.name}-{phase}-{record.number:05d}",
        )
        with progress(f"trials ({phase})", config.num_samples) as bar, tracked:
            return run_trials(
                SessionTrial if train.workers.count == 1 else RayTrainTrial,
                plan,
                config,
                propose,
                examine=self._examine,
                observers=[tracked, _Bar(bar, config.num_samples)],
                budget=budget,
                unneeded=unneeded(config.num_samples // self._pieces) if self._pieces > 1 else None,
            )


class _Bar:
    """A progress bar of trials that have ended."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar, self._total = bar, total
        self._ended: set[int] = set()

    def started(self, record: TrialRecord) -> None:
        """Ended before, if it has: this is another start of the sweep."""
        if record.end is not None:
            self.ended(record)

    def shown(self, number: int, step: int, metrics: dict[str, float]) -> None:
        """Not shown."""

    def ended(self, record: TrialRecord) -> None:
        self._ended.add(record.number)
        self._bar(len(self._ended), self._total)
