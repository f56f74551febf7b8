"""ASHA over a journal: what was decided before a kill stays decided."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from crab_platform.trial import AGAIN


class JournaledAsha(ASHAScheduler):
    """Ray Tune's ASHA, which learns from results that are shown again but does not judge them again.

    Shown again they come in another order, and a trial that went on at a rung might be stopped there: ASHA lets the
    first ones pass and knows more of the later ones.
    """

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """STOP or CONTINUE."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(AGAIN) else action
