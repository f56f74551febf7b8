"""ASHA and asynchronous HyperBand over a journal: what was decided before a kill stays decided."""

from __future__ import annotations

import math
import random
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from crab_platform.trial import AGAIN, NUMBER


class JournaledAsha(ASHAScheduler):
    """Ray Tune's ASHA, which learns from results that are shown again but does not judge them again.

    Shown again they come in another order, and a trial that went on at a rung might be stopped there: ASHA lets the
    first ones pass and knows more of the later ones.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """STOP or CONTINUE."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(AGAIN) else action


class JournaledHyperBand(JournaledAsha):
    """Several brackets of ASHA side by side, each with a later first rung: for metrics that show late who is good.

    Li et al., Hyperband, 2018 (arXiv:1603.06560), section 3; without waiting, as in Li et al., ASHA, 2020
    (arXiv:1810.05934), section 3.3. A trial's bracket is drawn by its number, so it has the same one after a kill; Ray
    Tune would draw another.
    """

    def __init__(
        self, *, max_t: int, grace_period: int, reduction_factor: float, **more: Any
    ) -> None:
        rungs = int(math.log(max_t / grace_period, reduction_factor) + 1e-9) + 1
        super().__init__(
            max_t=max_t,
            grace_period=grace_period,
            reduction_factor=reduction_factor,
            brackets=rungs,
            **more,
        )
        # Hyperband gives each bracket the same budget: a bracket of r rungs gets factor^(r - 1) / r of the trials.
        self._shares = [reduction_factor ** (r - 1) / r for r in range(rungs, 0, -1)]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Puts it into its bracket."""
        chance = random.Random(trial.config[NUMBER])
        (bracket,) = chance.choices(self._brackets, self._shares)
        self._trial_info[trial.trial_id] = bracket
