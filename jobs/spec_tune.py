"""The spec of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from jobs.spec_base import Place, Record
from jobs.spec_common import Job
from jobs.spec_train import TrainSpec

Sample = dict[str, Any]


class Search(Record):
    """Which trials are tried, and which of them go on."""

    samples: int = Field(default=24, ge=1)
    """Trials; with `pbt` the members of the population."""
    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    searcher: Literal["optuna", "random"] = "optuna"
    """`optuna`: its TPE, after ten random samples."""
    scheduler: Literal["asha", "hyperband", "pbt", "fifo"] = "asha"
    """`asha`: at each rung about one of `reduction_factor` trials goes on. `hyperband`: the same, but for a part of the
    trials the first rungs are left out. `pbt`: every `interval` steps the worst quarter goes on from the weights of the
    best, with other values. `fifo`: all go on to the end."""
    grace_steps: int = Field(default=10, ge=1)
    """The first rung, in steps; the others are this times powers of `reduction_factor`."""
    reduction_factor: float = Field(default=3, gt=1)
    interval: int | None = Field(default=None, ge=1)
    """Steps after which members of a population are compared."""
    seed: int = Field(default=1, ge=0)
    first: list[Sample] = Field(default_factory=list)
    """Samples that are tried before all others."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Trials at a time; as many as fit when left out."""
    max_failures: int = Field(default=3, ge=0)
    """So often a trial that crashed is started again."""


class BudgetLimits(Record):
    """The search starts nothing more when one of these is spent. Of the winner's re-runs nothing is counted."""

    cpu_hours: float | None = Field(default=None, gt=0)
    gpu_hours: float | None = Field(default=None, gt=0)
    money: float | None = Field(default=None, gt=0)
    """In the currency of the profile."""


class Confirm(Record):
    """What is trained to the end again, on several seeds: the winner, and what it is compared with."""

    seeds: int = Field(default=3, ge=1)
    compare: dict[str, Sample] = Field(default_factory=dict)
    """Name -> sample, for example {"n=1": {num_heads: 1}}; parameters that it leaves out are as in `train`."""


class TuneSpec(Job):
    """Trials of one train job with different settings; the best one is trained again on several seeds, and exported."""

    job: Literal["tune"]
    train: TrainSpec
    """What every trial is, without job, name, runs and tracking, which are the sweep's. `workers.count` is that of one
    trial; `validation` must say what trials are judged on."""
    space: list[str] = Field(min_length=1)
    """Names of modules in tune_spaces, or paths of files like them."""
    search: Search = Search()
    budget: BudgetLimits = BudgetLimits()
    prices: str | None = None
    """A profile (k8s/profiles) whose prices say what trials cost."""
    confirm: Confirm = Confirm()
    preprocess: Place | dict[str, Any] | None = None
    """The preprocess job to run first where the features are not there: path of its spec, or the spec itself. Without
    it a cold cache is refused."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, values: Any) -> Any:
        train = values.get("train") if isinstance(values, Mapping) else None
        if not isinstance(train, Mapping):
            return values
        common = {name: values[name] for name in ("name", "runs", "tracking") if name in values}
        filled = {"parse_rate_samples": 0, **train, "job": "train", **common}
        return {**values, "train": filled}

    @model_validator(mode="after")
    def _is_judged(self) -> TuneSpec:
        if self.train.validation is None:
            raise ValueError(
                "train.validation is missing: trials are judged on what is held out, "
                "for example train.validation: {samples_per_task: 8, every: 10}"
            )
        steps, grace = self.train.optimisation.steps, self.search.grace_steps
        if self.search.scheduler in ("asha", "hyperband") and grace > steps:
            raise ValueError(
                f"search.grace_steps {grace} is more than train.optimisation.steps {steps}: nothing would be stopped"
            )
        if (objection := self._population_objection()) is not None:
            raise ValueError(objection)
        if "winner" in self.confirm.compare:
            raise ValueError("confirm.compare: the name winner is taken; give that setting another")
        if self.budget.money is not None and self.prices is None:
            raise ValueError(
                "budget.money needs prices: name a profile, for example prices: laptop"
            )
        return self

    def _population_objection(self) -> str | None:
        """Why the population cannot be."""
        search, steps, validation = (
            self.search,
            self.train.optimisation.steps,
            self.train.validation,
        )
        assert validation is not None
        if search.scheduler != "pbt":
            return None if search.interval is None else "search.interval is of scheduler pbt only"
        if search.interval is None or search.interval >= steps:
            return (
                f"search.scheduler pbt needs search.interval, less than train.optimisation.steps {steps}: for example "
                f"{max(1, steps // 5)}"
            )
        if search.interval % validation.every:
            return (
                f"search.interval {search.interval} is no multiple of train.validation.every {validation.every}: "
                "members are compared by what they show"
            )
        if search.samples < max(2, len(search.first)):
            return (
                f"search.samples {search.samples} are the members of the population: there must be two at least, and "
                f"as many as in search.first ({len(search.first)})"
            )
        return None
