"""How much a sweep may take: hours of CPUs or GPUs, or money at the prices of a profile."""

from __future__ import annotations

from dataclasses import dataclass, field

from crab_platform.capacity import Need
from crab_platform.cost import Prices, compute_cost


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each may be left out."""

    cpu_hours: float | None = None
    gpu_hours: float | None = None
    money: float | None = None


@dataclass(kw_only=True)
class Budget:
    """What trials have taken so far, and whether that is enough. Results count, also those of before a kill."""

    need: Need
    limits: Limits = field(default_factory=Limits)
    prices: Prices | None = None
    seconds: float = 0.0
    """Of trials, side by side or one after the other."""

    def __post_init__(self) -> None:
        if self.limits.money is not None and self.prices is None:
            raise ValueError("a budget in money needs the prices of a profile")

    def take(self, seconds: float) -> None:
        """A trial has worked so long for a result."""
        self.seconds += seconds

    def cost(self, seconds: float) -> float | None:
        """Of so many seconds of a trial; None without prices."""
        if self.prices is None:
            return None
        workers = self.need.workers * seconds
        return compute_cost(workers * self.need.cpus, workers * self.need.gpus, self.prices)

    @property
    def cpu_hours(self) -> float:
        return self.seconds * self.need.workers * self.need.cpus / 3600

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.need.workers * self.need.gpus / 3600

    @property
    def money(self) -> float | None:
        return self.cost(self.seconds)

    def spent(self) -> str | None:
        """Why nothing more may be started; None while there is something left."""
        currency = self.prices.currency if self.prices else ""
        for taken, limit, unit in (
            (self.cpu_hours, self.limits.cpu_hours, "CPU-hours"),
            (self.gpu_hours, self.limits.gpu_hours, "GPU-hours"),
            (self.money, self.limits.money, currency),
        ):
            if limit is not None and taken is not None and taken >= limit:
                return (
                    f"the budget is spent: {taken:.4g} of {limit:g} {unit}. Raise it and start the same command again "
                    "to go on"
                )
        return None
