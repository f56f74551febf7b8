"""A sweep as plain values, for result.json, the report and other programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from crab_platform.budget import Budget
from crab_platform.trial import PARENT
from crab_platform.trial_journal import TrialRecord
from jobs.spec import TuneSpec
from jobs.trial_build import LABEL, SEED, plain
from tune_spaces.space import Space, describe

WINNER = "winner"


def winner_of(trials: Sequence[TrialRecord], metric: str, mode: str) -> TrialRecord | None:
    """The trial with the best last value among those that came furthest; None where none has shown a number."""
    shown = [t for t in trials if t.results and math.isfinite(_last(t, metric))]
    if not shown:
        return None
    furthest = max(trial.steps for trial in shown)
    sign = 1 if mode == "min" else -1
    return min(
        (trial for trial in shown if trial.steps == furthest), key=lambda t: sign * _last(t, metric)
    )


def trial_values(
    trial: TrialRecord, metric: str, mode: str, budget: Budget, parameters: int | None
) -> dict[str, Any]:
    """One trial; numbers that are none are None."""
    curve = [(r.step, _number(r.metrics.get(metric))) for r in trial.results]
    return {
        "number": trial.number,
        "config": plain(trial.config),
        "parent": trial.config.get(PARENT),
        "parameters": parameters,
        "status": trial.status,
        "reason": trial.end.reason if trial.end else "the sweep ended before",
        "steps": trial.steps,
        "curve": [[step, value] for step, value in curve],
        "best": _number(trial.best(metric, mode)),
        "last": curve[-1][1] if curve else None,
        "seconds": trial.seconds,
        "cost": budget.cost(trial.seconds),
        "failures": len(trial.failures),
        "started": trial.starts[0].at if trial.starts else None,
        "ended": trial.end.at if trial.end else None,
        "node": trial.starts[-1].node if trial.starts else None,
    }


def confirmed_values(
    trials: Sequence[TrialRecord], metric: str, steps: int
) -> list[dict[str, Any]]:
    """What was trained again: each setting with its value on every seed, mean and standard deviation (n - 1).

    Args:
        steps: of a trial to its end; those of a population's members that ended before are but a part of the way.
    """
    groups: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        groups.setdefault(trial.config[LABEL], []).append(trial)
    found = []
    for label, group in groups.items():
        done = [
            trial
            for trial in group
            if trial.status == "completed"
            and trial.steps == steps
            and math.isfinite(_last(trial, metric))
        ]
        values = [_last(trial, metric) for trial in done]
        found.append(
            {
                "label": label,
                "config": plain(group[-1].config),
                "seeds": [trial.config[SEED] for trial in done],
                "values": values,
                "mean": fmean(values) if values else None,
                "std": stdev(values) if len(values) > 1 else None,
                "failed": len({trial.config[SEED] for trial in group}) - len(done),
            }
        )
    return found


def sweep_values(
    spec: TuneSpec,
    space: Space,
    *,
    manifest: str,
    identity: str,
    trials: Sequence[Mapping[str, Any]],
    confirmed: Sequence[Mapping[str, Any]],
    budget: Budget,
    wall_seconds: float,
    capacity: Mapping[str, Any],
    stopped_because: str | None,
    adapter: str | None,
) -> dict[str, Any]:
    """The whole sweep."""
    return {
        "job": spec.job,
        "name": spec.name,
        "metric": spec.search.metric,
        "mode": spec.search.mode,
        "manifest": manifest,
        "identity": identity,
        "space": describe(space),
        "scheduler": spec.search.scheduler,
        "searcher": spec.search.searcher,
        "max_steps": spec.train.optimisation.steps,
        "seed": spec.search.seed,
        "trials": list(trials),
        "confirmed": list(confirmed),
        "spent": {
            "cpu_hours": budget.cpu_hours,
            "gpu_hours": budget.gpu_hours,
            "money": budget.money,
            "currency": budget.prices.currency if budget.prices else None,
            "wall_seconds": wall_seconds,
        },
        "capacity": dict(capacity),
        "stopped_because": stopped_because,
        "adapter": adapter,
    }


def _last(trial: TrialRecord, metric: str) -> float:
    return trial.results[-1].metrics.get(metric, math.nan)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
