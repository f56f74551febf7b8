"""Trials that cost nothing: a result is a point of a power law, known from the sample alone. And faults to order."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_platform.trial import JournaledTrial, TrialPlan
from crab_platform.trial_journal import Result

METRIC = "val/loss"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, by the number of the trial."""

    folder: str = ""
    """For the files that say that a fault has happened."""
    step_s: float = 0.0
    """So long every step takes, asleep."""
    crashes_once: Sequence[int] = ()
    """These raise once, at a step that their number decides."""
    dies_once: Sequence[int] = ()
    """The process of these is killed once."""
    crashes_always: Sequence[int] = ()
    metric: str = METRIC
    """What is reported."""
    bad_nodes: Sequence[str] = ()
    """Ray's ids of nodes on which every trial fails."""


def loss(sample: Mapping[str, Any], step: int) -> float:
    """Power law: what is left in the end, and how fast it is reached, depend on the sample."""
    x, y = float(sample["x"]), float(sample["y"])
    return (x - 0.3) ** 2 + 0.1 * abs(y) + (1 + x) * step ** -(0.3 + 0.5 * abs(y))


class CurveTrial(JournaledTrial):
    """The plan's `build` holds the faults."""

    def _prepare(self, sample: Mapping[str, Any], known: Sequence[Result]) -> None:
        self._faults: Any = self._plan.build
        self._at = known[-1].step if known else self._begins_at
        if self._faults.folder:
            with Path(self._faults.folder, f"pid-{self._journal.number}").open("a") as file:
                file.write(f"{os.getpid()}\n")

    def _train_to(self, step: int) -> dict[str, float]:
        faults: Faults = self._faults
        number = self._journal.number
        for now in range(self._at + 1, step + 1):
            time.sleep(faults.step_s)
            worked = Path(faults.folder, f"worked-{number}")
            if faults.folder:
                with worked.open("a") as file:
                    file.write(f"{now}\n")
            if self._node() in faults.bad_nodes:
                raise OSError("this node has no disk")
            if number in faults.crashes_always:
                raise ZeroDivisionError(f"trial {number} is hopeless")
            when = random.Random(number).randrange(1, max(2, self._plan.num_steps))
            if now == when and number in (*faults.crashes_once, *faults.dies_once):
                if self._once(f"fault-{number}"):
                    if number in faults.dies_once:
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError(f"trial {number} crashed at step {now}")
        self._at = step
        return {faults.metric: loss(self._sample, step)}

    def _once(self, name: str) -> bool:
        try:
            Path(self._faults.folder, name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def plan(
    url: str,
    faults: Faults,
    *,
    num_steps: int = 9,
    report_every: int = 1,
    metric: str = METRIC,
    piece_steps: int | None = None,
) -> TrialPlan:
    from crab_platform.training_config import TrainingConfig

    return TrialPlan(
        url=url,
        build=faults,  # type: ignore[arg-type]  # a curve has nothing to build
        training=TrainingConfig(name="curves", storage_path=url),
        metric=metric,
        num_steps=num_steps,
        report_every=report_every,
        piece_steps=piece_steps,
    )


class ForgetfulCurveTrial(CurveTrial):
    """Planted bug: what was shown before is not looked for."""

    def _open(self, config: dict[str, Any]) -> None:
        super()._open(config)
        self._known, self._stops_at = [], None


class HeavyCurveTrial(CurveTrial):
    """With what a trial that trains has to import: for benchmarks."""

    def _prepare(self, sample: Mapping[str, Any], known: Sequence[Result]) -> None:
        import torch  # noqa: F401 (it is the time that counts)
        import transformers  # noqa: F401 (likewise)

        super()._prepare(sample, known)
