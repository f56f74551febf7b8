"""When ranks are said to hang, and when not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from crab_platform.hang import PATIENCE_S, SILENT_S, Beat, report, verdict

ONE = Beat(
    rank=0,
    node="n0",
    pid=10,
    born=1.0,
    phase="train",
    step=7,
    idle_s=1.0,
    longest_s=2.0,
    stack="in all_reduce\n",
)
OTHER = replace(ONE, rank=1, pid=11, stack="in backward\n")


def test_ranks_that_work_are_left_alone() -> None:
    assert verdict([(ONE, 1.0), (OTHER, 2.0)], 50) is None
    assert verdict([], 50) is None


def test_a_silent_rank_is_named() -> None:
    why = verdict([(ONE, 1.0), (OTHER, SILENT_S + 1)], 50)
    assert why is not None
    assert "rank 1 (pid 11)" in why


def test_a_rank_that_waits_while_another_works_does_not_hang() -> None:
    waits = replace(ONE, idle_s=500.0)
    assert verdict([(waits, 0.0), (OTHER, 0.0)], 50) is None
    assert verdict([(waits, 0.0), (replace(OTHER, idle_s=51.0), 0.0)], 50) is not None


@pytest.mark.parametrize(
    "beat",
    [
        replace(ONE, longest_s=6.0),  # 10 times the longest is more than the limit
        replace(ONE, longest_s=0.0),  # its first: compiles, makes connections
        replace(ONE, phase="data"),  # the store may be away
        replace(ONE, phase="start"),
        replace(ONE, phase="end"),
    ],
)
def test_work_that_is_slow_by_nature_is_waited_for(beat: Beat) -> None:
    assert verdict([(replace(beat, idle_s=55.0), 0.0)], 50) is None
    assert verdict([(replace(beat, idle_s=PATIENCE_S + 1), 0.0)], 50) is not None


def test_the_report_has_the_stacks_of_all() -> None:
    text = report("why", [(OTHER, 31.0), (ONE, 1.0)])
    assert text.index("why") < text.index("in all_reduce") < text.index("in backward")
    assert "rank 1, pid 11 on node n0: phase train, step 7, last heard of 31.0 s ago" in text
