"""The real cache code in simulated histories (A11, A12 of reference/reliability.md): `simulation/` tells how.

One seed is one history: jobs, trainers, people who pin, garbage collections, on a network that loses and delays, on
machines that die, sleep and disagree about time. A history that breaks a promise is printed with the command that
shows it step by step. Planted bugs prove that broken promises are seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from simulation.planted import BUGS
from simulation.run import Summary, describe, first_failure, run_many

FULL = 100_000
FULL_CLOCKS = 20_000
FULL_BUG = 10_000
QUICK = 1_500
QUICK_CLOCKS = 200
QUICK_PARQUET = 20
NEAR = 300
"""The product changes, and histories with it: a bug is looked for from its known seed on, in so many."""

KNOWN = {
    "commit_before_pack": 0,
    "digest_not_checked": 10,
    "job_looks_before_it_leases": 0,
    "leases_die_without_allowance": 700,
    "leases_read_before_the_mark": 650,
    "lost_answer_taken_for_a_conflict": 0,
    "packs_deleted_before_commits": 0,
    "quarantine_not_read": 0,
    "sweep_does_not_look_again": 0,
    "sweep_ignores_leases": 0,
    "sweep_ignores_pins": 0,
}

PROFILE = {"leases_die_without_allowance": "clocks"}
"""Where it is found; the others among histories with all troubles."""


def processes() -> int:
    return len(os.sched_getaffinity(0))


def run(seeds: int, profile: str, *, parquet: bool = False) -> Summary:
    """Runs these histories and prints what went wrong."""
    total = Summary()
    parts = run_many(range(seeds), processes=processes(), profile=profile, parquet=parquet)
    for summary in parts:
        total.seeds += summary.seeds
        total.failed += summary.failed
        total.stats.update(summary.stats)
    for outcome in total.failed:
        print(describe(outcome, profile))
    return total


def find(bug: str, seeds: Sequence[int]) -> None:
    """Prints the first of these histories that finds a planted bug; there must be one."""
    profile = PROFILE.get(bug, "all")
    found = first_failure(bug, seeds, processes=processes(), profile=profile)
    assert found is not None
    print(bug, describe(found, profile, bug))


def check(total: Summary, seeds: int) -> None:
    assert total.seeds == seeds
    assert [outcome.seed for outcome in total.failed] == []
    # That nothing was broken says something only when much was done.
    for what in (
        "published",
        "read",
        "pinned",
        "gc",
        "deleted",
        "spared",
        "taken back",
        "compacted",
    ):
        assert total.stats[what] * 200 >= seeds, what


def test_no_history_breaks_a_promise() -> None:
    total = run(QUICK, "all")
    check(total, QUICK)
    assert total.stats["died"] > 0
    assert total.stats["lease lost"] > 0


def test_clocks_ten_minutes_off_break_nothing() -> None:
    check(run(QUICK_CLOCKS, "clocks"), QUICK_CLOCKS)


def test_no_history_breaks_a_promise_with_real_parquet_files() -> None:
    total = run(QUICK_PARQUET, "all", parquet=True)
    assert [outcome.seed for outcome in total.failed] == []


def test_a_history_is_a_function_of_its_seed() -> None:
    from simulation.history import simulated
    from simulation.run import run_seed

    with simulated():
        one, other = (run_seed(7, trace=True) for _ in range(2))
    assert one.trace == other.trace
    assert len(one.trace) > 10


@pytest.mark.parametrize("bug", sorted(KNOWN))
def test_a_planted_bug_is_found(bug: str) -> None:
    seeds = range(KNOWN[bug], KNOWN[bug] + NEAR)
    find(bug, seeds)


@pytest.mark.faults
def test_no_history_of_100_000_breaks_a_promise() -> None:
    check(run(FULL, "all"), FULL)


@pytest.mark.faults
def test_clocks_ten_minutes_off_break_nothing_in_20_000_histories() -> None:
    check(run(FULL_CLOCKS, "clocks"), FULL_CLOCKS)


@pytest.mark.faults
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_a_planted_bug_is_found_within_10_000_histories(bug: str) -> None:
    find(bug, range(FULL_BUG))
