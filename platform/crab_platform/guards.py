"""Which optimizer steps are applied: not one whose loss or gradient norm is no number, or far above the last ones.

The rule is OLMo-core's SkipStepOptimizer (6 standard deviations above the mean of the last 128 steps), here of
logarithms, and over good steps only, so that one spike does not hide the next. Gradient norms vary by factors: of 500
clean steps of a small model the rule on plain values skips up to five. What is judged is summed over ranks before, so
that every rank comes to the same verdict.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, pstdev
from typing import Any

WINDOW = 128
ENOUGH = 64
"""Good steps that must have been seen before anything finite is a spike."""
SIGMAS = 6.0
LEAST_SIGMA = 0.01
"""Of a logarithm: values that hardly differ from each other make no spike of one that is 6 % above them."""
MAX_SKIPPED = 3
_TINY = 1e-30
"""In the place of 0, which has no logarithm."""


class SkippedTooOftenError(FloatingPointError):
    """So many steps in a row were skipped that to go on is of no use."""


class Guard:
    """The memory of the rule, one for each rank, equal on all."""

    def __init__(self, max_skipped: int = MAX_SKIPPED) -> None:
        self._max_skipped = max_skipped
        self._good: dict[str, deque[float]] = {
            name: deque(maxlen=WINDOW) for name in ("loss", "gradient_norm")
        }
        self.last_good_step = 0
        self.in_a_row = 0
        self.skipped_steps = 0

    def objection(self, values: Mapping[str, float]) -> str | None:
        """Why a step with this loss and gradient norm must not be applied; None if it may. Changes nothing."""
        for name, value in values.items():
            if not math.isfinite(value):
                return f"{name} is {value}"
            good = self._good[name]
            if len(good) >= ENOUGH:
                mean = fmean(good)
                limit = math.exp(mean + SIGMAS * max(pstdev(good, mean), LEAST_SIGMA))
                if value > limit:
                    return f"{name} {value:g} is above {limit:g}, {SIGMAS:g} sigma over {len(good)} good steps"
        return None

    def note(self, step: int, values: Mapping[str, float], objection: str | None) -> None:
        """Remembers the verdict on `step` (1-based).

        Raises SkippedTooOftenError when it is one skipped step too many in a row.
        """
        if objection is None:
            for name, value in values.items():
                self._good[name].append(math.log(max(value, _TINY)))
            self.last_good_step, self.in_a_row = step, 0
            return
        self.in_a_row += 1
        self.skipped_steps += 1
        if self.in_a_row >= self._max_skipped:
            raise SkippedTooOftenError(
                f"step {step}: {objection}; {self.in_a_row} steps in a row were skipped, the last good step is "
                f"{self.last_good_step}. No checkpoint holds a step that was skipped. Look at the data of these steps, "
                "lower the learning rate, or train in float32"
            )

    def state(self) -> dict[str, Any]:
        """All that `load` needs to decide as this guard would; plain JSON."""
        return {
            "good": {name: list(values) for name, values in self._good.items()},
            "last_good_step": self.last_good_step,
            "in_a_row": self.in_a_row,
            "skipped_steps": self.skipped_steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; an empty one, of a checkpoint without a guard, is a fresh start."""
        if not state:
            return
        for name, values in self._good.items():
            values.clear()
            values.extend(state["good"][name])
        self.last_good_step = int(state["last_good_step"])
        self.in_a_row = int(state["in_a_row"])
        self.skipped_steps = int(state["skipped_steps"])


class Gate:
    """Stands before Adam in a DeepSpeed engine. A closed gate lets no update pass: weights, moments and step count stay
    and nothing decays, while the engine clears its gradients as after any step.

    DeepSpeed knows the global gradient norm only inside `engine.step`, just before it calls Adam, once for each shard
    group: the first call of a step decides for all.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._update: Callable[..., Any] = engine.basic_optimizer.step
        self._judge: Callable[[float | None], bool] = lambda _norm: True
        self._open: bool | None = None
        engine.basic_optimizer.step = self._step

    def arm(self, judge: Callable[[float | None], bool]) -> None:
        """Before the `engine.step` that updates: asks `judge` with the global gradient norm, once."""
        self._judge, self._open = judge, None

    def passed(self) -> bool:
        """Whether the update was applied. DeepSpeed itself leaves out one whose norm is no number."""
        return bool(self._open)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        if self._open is None:
            self._open = self._judge(self._norm())
        return self._update(*args, **kwargs) if self._open else None

    def _norm(self) -> float | None:
        norm = getattr(self._engine.optimizer, "_global_grad_norm", None)
        if (
            norm is None
        ):  # without ZeRO in float32; by now NaN in one gradient is in all, by clipping
            weights = [p for group in self._engine.optimizer.param_groups for p in group["params"]]
            whole = all(bool(p.grad.isfinite().all()) for p in weights if p.grad is not None)
            return None if whole else math.nan
        value = float(norm)
        return value if value >= 0 else math.nan  # -1 is DeepSpeed's sign for NaN and infinity
