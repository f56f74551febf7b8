"""A sweep as its sweep.json tells it, made fit to be drawn: numbers are finite or None, texts are clean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from crab.report.colours import level_of
from crab.report.scales import limits, number, short, word
from crab.report.sweep_parameters import Parameter, read_parameters
from crab.report.texts import clean

STATUSES = ("completed", "stopped", "failed", "refused", "unfinished")

_REASON = 160
"""Characters of a reason in the words that appear over a mark: a page of 500 trials holds them several times."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial. `key` is its place in the file: numbers need not be unique, nor numbers."""

    key: int
    name: str
    config: Mapping[str, Any]
    status: str
    """One of STATUSES."""
    reason: str
    steps: float
    curve: tuple[tuple[float, float | None], ...]
    """(step, value) by step; None where the value was not finite."""
    best: float | None
    last: float | None
    seconds: float | None
    cost: float | None
    parameters: float | None
    failures: int
    started: datetime | None
    ended: datetime | None
    node: str
    parent: str | None
    """Name of the trial that it has gone on from, in a population."""

    @property
    def counts(self) -> bool:
        """Whether its best value may be compared with those of others."""
        return self.best is not None and self.status not in ("failed", "refused")

    def value_at(self, step: float) -> float | None:
        return dict(self.curve).get(step)


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A configuration that was trained with several seeds."""

    label: str
    config: Mapping[str, Any]
    seeds: tuple[str, ...]
    values: tuple[float | None, ...]
    mean: float | None
    std: float | None

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if value is not None]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was swept, and what came of it."""

    name: str
    metric: str
    lower_is_better: bool
    parameters: tuple[Parameter, ...]
    trials: tuple[Trial, ...]
    confirmed: tuple[Confirmed, ...]
    max_steps: float
    currency: str
    limits: tuple[float, float] | None
    """(best, worst) of the values that have a colour of their own; None where no trial has a value."""

    @property
    def searched(self) -> list[Parameter]:
        """Those that figures show."""
        return [parameter for parameter in self.parameters if parameter.searched]

    @property
    def metric_title(self) -> str:
        """Of an axis of the metric."""
        return f"{self.metric} ({self.better} is better)"

    @property
    def better(self) -> str:
        return "lower" if self.lower_is_better else "higher"

    def is_better(self, one: float, other: float) -> bool:
        return one < other if self.lower_is_better else one > other

    def best_of(self, values: Sequence[float]) -> float:
        return min(values) if self.lower_is_better else max(values)

    def worst_of(self, values: Sequence[float]) -> float:
        return max(values) if self.lower_is_better else min(values)

    @property
    def winner(self) -> Trial | None:
        """The trial with the best value; the first of them where several have it."""
        found = [trial for trial in self.trials if trial.counts]
        sign = 1 if self.lower_is_better else -1
        return min(found, key=lambda trial: sign * (trial.best or 0.0)) if found else None

    def level(self, value: float | None) -> int | None:
        """The colour of a value: levels from worst to best; None without a value."""
        if value is None or self.limits is None:
            return None
        best, worst = self.limits
        return level_of((value - worst) / (best - worst) if best != worst else 1.0)

    def words(self, trial: Trial) -> str:
        """All about a trial in a few lines."""
        steps = f" after {trial.steps:g} steps" if trial.steps else ""
        lines = [f"trial {trial.name}: {trial.status}{steps}"]
        lines += [f"goes on from trial {trial.parent}"] if trial.parent is not None else []
        lines += [f"best {self.metric} {short(trial.best)}"] if trial.best is not None else []
        lines += [f"{clean(key)} = {word(value)}" for key, value in trial.config.items()]
        lines += [trial.reason[:_REASON]] if trial.reason else []
        return "\n".join(lines)


def trials(count: int) -> str:
    """1 trial, 2 trials."""
    return f"{count} trial{'' if count == 1 else 's'}"


def read_sweep(sweep: Mapping[str, Any]) -> Sweep:
    """Raises ValueError where the mapping is no record of a sweep."""
    missing = [key for key in ("name", "metric", "mode", "trials") if key not in sweep]
    if missing:
        raise ValueError(
            f"this is no record of a sweep: it has no {missing[0]!r}; give the sweep.json of a tune job"
        )
    if sweep["mode"] not in ("min", "max"):
        raise ValueError(f"mode is {sweep['mode']!r}, expected 'min' or 'max'")
    lower_is_better = sweep["mode"] == "min"
    found = tuple(_trial(key, raw) for key, raw in enumerate(sweep["trials"]))
    values = [trial.best for trial in found if trial.counts and trial.best is not None]
    spent = sweep.get("spent") or {}
    return Sweep(
        name=clean(str(sweep["name"])),
        metric=clean(str(sweep["metric"])),
        lower_is_better=lower_is_better,
        parameters=read_parameters(sweep.get("space") or {}, [trial.config for trial in found]),
        trials=found,
        confirmed=tuple(_confirmed(raw) for raw in sweep.get("confirmed") or ()),
        max_steps=number(sweep.get("max_steps")) or 0.0,
        currency=clean(str(spent.get("currency") or "")),
        limits=limits(values, lower_is_better),
    )


def _trial(key: int, raw: Mapping[str, Any]) -> Trial:
    status = raw.get("status")
    reason = clean(str(raw.get("reason") or ""))
    if status not in STATUSES:
        # A newer sweep may know more kinds of ends than this page; what it says is not lost.
        status, reason = "unfinished", f"{clean(str(status))}. {reason}".strip()
    curve = _curve(raw.get("curve") or ())
    return Trial(
        key=key,
        name=word(raw.get("number", key)),
        config=raw.get("config") or {},
        status=status,
        reason=reason,
        steps=number(raw.get("steps")) or 0.0,
        curve=curve,
        best=number(raw.get("best")),
        last=number(raw.get("last")),
        seconds=number(raw.get("seconds")),
        cost=number(raw.get("cost")),
        parameters=number(raw.get("parameters")),
        failures=int(number(raw.get("failures")) or 0),
        started=_time(raw.get("started")),
        ended=_time(raw.get("ended")),
        node=clean(str(raw.get("node") or "")),
        parent=None if raw.get("parent") is None else word(raw["parent"]),
    )


def _curve(raw: Sequence[Sequence[Any]]) -> tuple[tuple[float, float | None], ...]:
    """By step; a step that was done twice counts as it was done last."""
    found = {at: number(value) for step, value in raw if (at := number(step)) is not None}
    return tuple(sorted(found.items()))


def _confirmed(raw: Mapping[str, Any]) -> Confirmed:
    return Confirmed(
        label=clean(str(raw.get("label", ""))),
        config=raw.get("config") or {},
        seeds=tuple(word(seed) for seed in raw.get("seeds") or ()),
        values=tuple(number(value) for value in raw.get("values") or ()),
        mean=number(raw.get("mean")),
        std=number(raw.get("std")),
    )


def _time(raw: Any) -> datetime | None:
    """An instant; one without a zone is taken for UTC, and what is no instant for none."""
    try:
        found = datetime.fromisoformat(raw)
    except (TypeError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
