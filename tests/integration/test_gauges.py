"""Metrics of a run reach Prometheus: a real Ray shows them on a node's port."""

from __future__ import annotations

import math
import re
import urllib.request
from collections.abc import Iterator

import pytest
import ray
from support.crab_runs import wait_for

from crab_platform import gauges

pytestmark = pytest.mark.ray


@pytest.fixture
def metrics_port() -> Iterator[int]:
    """Of the node of a Ray of our own."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield int(ray.nodes()[0]["MetricsExportPort"])
    ray.shutdown()


def shown(port: int) -> dict[tuple[str, str], float]:
    """(run, metric) -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for labels, value in re.findall(r"^ray_crab_metric\{(.*)\} (\S+)$", text, re.MULTILINE):
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[named["run"], named["metric"]] = float(value)
    return found


def test_the_last_value_of_each_metric_is_shown(metrics_port: int) -> None:
    gauges.show("train", {"loss": 3.0, "router/entropy": 0.5, "gradient_norm": math.nan})
    gauges.show("train", {"loss": 2.0})
    expected = {("train", "loss"): 2.0, ("train", "router/entropy"): 0.5}
    wait_for(lambda: shown(metrics_port) == expected, "the metrics to be shown")


def test_without_a_cluster_nothing_is_shown_and_nothing_breaks() -> None:
    gauges.show("train", {"loss": 3.0})
    assert not ray.is_initialized()
