"""B4: a run that goes on with another number of workers learns the same, with dropout on: 2 -> 1 -> 4 -> 2.

Printed: the largest relative difference of a loss from that of a run with one worker all along (goal 1e-6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_training import Plan, Run, run, write_llm

from crab_platform.ray_cluster import connected

pytestmark = [pytest.mark.ray, pytest.mark.faults]

WORKERS = (2, 1, 4, 2)
STEPS_EACH = 2
TOLERANCE = 1e-6
"""Relative, in float32 (reliability.md, B4)."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with connected(num_cpus=5):
        yield write_llm(tmp_path_factory.mktemp("llm"))


def plan_of(llm: str, out: Path) -> Plan:
    # The learning rate of our jobs: where Adam's moments are rounding errors, the order of sums turns whole steps.
    steps = STEPS_EACH * len(WORKERS)
    return Plan(llm=llm, out=str(out), dropout=0.2, parts=4, steps=steps, peak=1e-3)


def alone(plan: Plan, zero_stage: int = 3) -> Run:
    return run(plan, num_workers=1, micro_batches=4, zero_stage=zero_stage)


def changing(plan: Plan, zero_stage: int = 3) -> list[dict[str, float]]:
    """The metrics of all steps when each two are done by another number of workers."""
    metrics: list[dict[str, float]] = []
    for number, count in enumerate(WORKERS, 1):
        part = replace(plan, stop_after=STEPS_EACH * number)
        seen = run(
            part, num_workers=count, micro_batches=plan.parts // count, zero_stage=zero_stage
        )
        assert seen.steps == [STEPS_EACH * (number - 1) + 1, STEPS_EACH * number]
        metrics += seen.metrics
    return metrics


def worst(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    return max(abs(m["loss"] - t["loss"]) / t["loss"] for m, t in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("zero_stage", [3, 2, 0])
def test_another_number_of_workers_learns_the_same(
    llm: str, tmp_path: Path, zero_stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    unchanged = alone(plan_of(llm, tmp_path / "alone"), zero_stage).metrics
    metrics = changing(plan_of(llm, tmp_path / "changing"), zero_stage)
    # Sets of samples, a bit each: none left out, none seen twice.
    assert [m["samples"] for m in metrics] == [m["samples"] for m in unchanged]
    difference = worst(metrics, unchanged)
    with capsys.disabled():
        print(f"\nB4: ZeRO {zero_stage}, workers {WORKERS}: losses differ by {difference:.1e}")
    assert difference <= TOLERANCE


def test_a_run_starts_with_the_workers_that_there_is_room_for(llm: str, tmp_path: Path) -> None:
    """Two workers of three CPUs have no room where there are five: one starts, and learns the same."""
    unchanged = alone(plan_of(llm, tmp_path / "alone")).metrics
    plan = plan_of(llm, tmp_path / "fewer")
    fewer = run(plan, num_workers=2, min_workers=1, micro_batches=2, cpus_per_worker=3)
    assert len((tmp_path / "fewer" / "pids").read_text().split()) == 1
    assert worst(fewer.metrics, unchanged) <= TOLERANCE


def test_dropout_by_rank_is_noticed(llm: str, tmp_path: Path) -> None:
    """Teeth: with dropout drawn by rank (planted) the losses are not those of one worker."""
    planted = replace(plan_of(llm, tmp_path / "alone"), forgets="part")
    unchanged = alone(planted).metrics
    metrics = changing(replace(planted, out=str(tmp_path / "changing")))
    assert [m["samples"] for m in metrics] == [m["samples"] for m in unchanged]
    assert worst(metrics, unchanged) > 1e3 * TOLERANCE
