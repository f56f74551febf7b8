"""A sweep over curve_trials as a program of its own, with MLflow: python -m support.sweep_driver SETTINGS (as JSON)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from support.curve_trials import METRIC, CurveTrial, Faults, ForgetfulCurveTrial, plan

from crab_platform import ray_cluster, tracking
from crab_platform.search import OptunaProposals
from crab_platform.storage import open_store
from crab_platform.sweep_tracking import SweepTracking
from crab_platform.tuning import Sweep, SweepConfig, run_trials

SPACE = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0.05, 1, log=True)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    folder: str
    """For the sweep, and for what its trials leave."""
    mlflow: str
    num_samples: int = 8
    num_steps: int = 15
    scheduler: Any = "fifo"
    forgets: bool = False
    faults: Any = None
    """Of Faults, but its folder."""

    @property
    def url(self) -> str:
        return f"{self.folder}/sweep"


def proposals(seed: int = 1) -> OptunaProposals:
    return OptunaProposals(space=SPACE, searcher="optuna", metric=METRIC, mode="min", seed=seed)


def run(settings: Settings) -> Sweep:
    """Inside a connection to Ray."""
    faults = Faults(folder=settings.folder, **(settings.faults or {}))
    with tracking.start_run(
        settings.mlflow,
        "sweeps",
        "sweep",
        spec={"seed": 1},
        folder=Path(settings.folder, "parent"),
        resume="the-sweep",
        resume_finished=True,
    ) as parent:
        tracked = SweepTracking(
            parent,
            open_store(settings.url),
            identity="the-sweep",
            folder=Path(settings.folder, "spools"),
            spec_of=dict,
            name_of=lambda record: f"trial-{record.number}",
        )
        with tracked:
            return run_trials(
                ForgetfulCurveTrial if settings.forgets else CurveTrial,
                plan(settings.url, faults, num_steps=settings.num_steps),
                SweepConfig(
                    mode="min", num_samples=settings.num_samples, scheduler=settings.scheduler
                ),
                proposals(),
                observers=[tracked],
            )


if __name__ == "__main__":
    with ray_cluster.connected(2):
        swept = run(Settings(**json.loads(sys.argv[1])))
    print(json.dumps({trial.number: trial.status for trial in swept.trials}))
