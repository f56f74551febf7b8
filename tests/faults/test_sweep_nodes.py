"""A node on which everything fails does not take the sweep with it: real Ray with several nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support.curve_trials import CurveTrial, Faults, plan
from support.sweep_driver import proposals

from crab_platform.bad_nodes import TOO_MANY, BadNodes
from crab_platform.trial_journal import TrialRecord
from crab_platform.tuning import SweepConfig, run_trials

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """A head that takes no trials, and two nodes for one trial each: their ids."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ids = [cluster.add_node(num_cpus=1).node_id for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield ids
    ray.shutdown()
    cluster.shutdown()


def sweep(folder: Path, bad: str) -> list[TrialRecord]:
    faults = Faults(bad_nodes=(bad,), step_s=1.5)
    config = SweepConfig(mode="min", num_samples=14, scheduler="fifo", max_failures=3)
    return run_trials(
        CurveTrial, plan(str(folder), faults, num_steps=3), config, proposals()
    ).trials


def test_a_bad_node_is_set_aside(tmp_path: Path, nodes: list[str]) -> None:
    trials = sweep(tmp_path, nodes[0])
    assert [trial.status for trial in trials] == ["completed"] * 14
    failures = sum(len(trial.failures) for trial in trials)
    assert TOO_MANY <= failures <= TOO_MANY + 2, "trials went on being given to it"
    assert {result.node for trial in trials for result in trial.results} == {nodes[1]}


def test_without_it_trials_go_on_being_given_to_it(
    tmp_path: Path, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: no node is ever set aside."""
    monkeypatch.setattr(BadNodes, "failed", lambda *_: False)
    trials = sweep(tmp_path, nodes[0])
    assert sum(len(trial.failures) for trial in trials) > TOO_MANY + 2
