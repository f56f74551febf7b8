"""What a job on a cluster costs: its pods, for as long as they are there, at the profile's prices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from crab_platform.cost import Prices, compute_cost

_NO_ACCELERATORS = "memory", "ephemeral-storage", "hugepages"


@dataclass(frozen=True, kw_only=True)
class JobCost:
    """In the currency of the prices."""

    currency: str
    hourly: float
    """With all of its pods."""
    hourly_least: float
    """With the fewest that it may have: less where workers come and go with the work."""
    hours: float
    """From the start of its first pods to its end, or till now; waiting in a queue costs nothing."""

    @property
    def at_most(self) -> float:
        """As if all pods had been there all the time. Storage and requests are not in it."""
        return self.hourly * self.hours

    def __str__(self) -> str:
        word = "" if self.hourly == self.hourly_least else "at most "
        digits = 2 if self.at_most >= 1 or self.at_most == 0 else 4
        return f"{word}{self.at_most:.{digits}f} {self.currency}"


def job_cost(job: Mapping[str, Any], prices: Prices, first_start: str | None = None) -> JobCost:
    """Of a RayJob as the API has it, or of one that was not sent yet (0 hours).

    Args:
        first_start: ISO time of the first attempt, where there were several: the API knows of the last one only.
    """
    status = job.get("status", {})
    starts = [_time(at) for at in (status.get("startTime"), first_start) if at]
    end = _time(status["endTime"]) if status.get("endTime") else datetime.now(UTC)
    hours = max(0.0, (end - min(starts)).total_seconds() / 3600) if starts else 0.0
    most = least = 0.0
    for spec, at_least, at_most in _pods(job):
        hour = _hour(spec, prices)
        least += at_least * hour
        most += at_most * hour
    return JobCost(currency=prices.currency, hourly=most, hourly_least=least, hours=hours)


def _pods(job: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], int, int]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"], 1, 1
    for group in cluster["workerGroupSpecs"]:
        yield group["template"]["spec"], group["minReplicas"], group["maxReplicas"]


def _hour(pod: Mapping[str, Any], prices: Prices) -> float:
    cpus = gpus = 0.0
    for container in pod["containers"]:
        for name, amount in container["resources"]["limits"].items():
            if name == "cpu":
                cpus += _cores(amount)
            elif not name.startswith(_NO_ACCELERATORS):
                gpus += float(amount)
    return compute_cost(3600 * cpus, 3600 * gpus, prices)


def _cores(amount: str) -> float:
    return float(amount.removesuffix("m")) * (1e-3 if amount.endswith("m") else 1.0)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
