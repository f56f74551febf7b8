"""The last value of every metric of a run, for Prometheus: Ray's agents show it on each pod as `ray_crab_metric`.

One gauge with the metric's name as a label: names come from recipes, and a dashboard must not know them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import ray
from ray.util.metrics import Gauge


def show(run: str, values: Mapping[str, float]) -> None:
    """Shows the values of a run by its name; nothing where this process is on no Ray cluster, whose agents show it."""
    if not ray.is_initialized():
        return
    for name, value in values.items():
        if math.isfinite(value):
            _gauge().set(value, tags={"run": run, "metric": name})


@cache
def _gauge() -> Gauge:
    return Gauge("crab_metric", "The last value of a metric of a run", tag_keys=("run", "metric"))
