"""Who wins a sweep, and what is said of settings that were trained again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from crab_platform.budget import Budget
from crab_platform.capacity import Need
from crab_platform.trial import PARENT
from crab_platform.trial_journal import End, Result, Status, TrialRecord
from jobs.sweep_record import confirmed_values, trial_values, winner_of
from jobs.trial_build import LABEL, SEED

METRIC = "val/loss"


def trial(number: int, *values: float, status: Status = "completed", **config: Any) -> TrialRecord:
    """One that has shown these values, ten steps apart."""
    results = [
        Result(step=10 * n, metrics={METRIC: value}, seconds=2.0, node="n", at="")
        for n, value in enumerate(values, start=1)
    ]
    end = None if status == "unfinished" else End(status=status, reason="why", at="later")
    return TrialRecord(number=number, config=config, asked_at="", results=results, end=end)


def test_the_winner_is_the_best_of_those_that_came_furthest() -> None:
    trials = [
        trial(0, 3.0, 2.0),
        trial(1, 0.1, status="stopped"),  # the best value of all, and not trained as long
        trial(2, 3.0, 1.5),
        trial(3, 1.0, 1.9),  # was better once
        trial(4, 3.0, math.nan),
    ]
    assert winner_of(trials, METRIC, "min") is trials[2]
    assert winner_of(trials, METRIC, "max") is trials[0]
    assert winner_of(trials, "val/other", "min") is None
    assert winner_of([], METRIC, "min") is None


def test_confirmed_settings_have_mean_and_spread_of_their_seeds() -> None:
    trials = [
        trial(0, 9.0, 1.0, num_heads=3, **{LABEL: "winner", SEED: 43}),
        trial(1, 9.0, 2.0, num_heads=1, **{LABEL: "n=1", SEED: 43}),
        trial(2, 9.0, 3.0, num_heads=3, **{LABEL: "winner", SEED: 44}),
        trial(3, status="failed", num_heads=1, **{LABEL: "n=1", SEED: 44}),
    ]
    winner, rival = confirmed_values(trials, METRIC, 20)
    assert (winner["label"], winner["config"], winner["seeds"]) == (
        *("winner", {"num_heads": 3}, [43, 44]),
    )
    assert winner["values"] == [1.0, 3.0]
    assert (winner["mean"], winner["std"]) == (2.0, pytest.approx(math.sqrt(2)))
    assert (rival["values"], rival["mean"], rival["std"], rival["failed"]) == ([2.0], 2.0, None, 1)


def test_of_a_way_in_pieces_only_the_last_one_counts() -> None:
    """Seed 43 comes to the end, seed 44 fails on its way."""
    trials = [
        trial(0, 9.0, rate=1.0, **{LABEL: "winner", SEED: 43}),
        trial(1, 8.0, rate=1.0, **{LABEL: "winner", SEED: 44}),
        trial(2, 9.0, 5.0, rate=1.2, **{LABEL: "winner", SEED: 43, PARENT: 0}),
        trial(3, status="failed", rate=1.2, **{LABEL: "winner", SEED: 44, PARENT: 1}),
    ]
    (winner,) = confirmed_values(trials, METRIC, 20)
    assert (winner["seeds"], winner["values"], winner["failed"]) == ([43], [5.0], 1)
    assert winner["config"] == {"rate": 1.2}, "what it has at its end"


def test_numbers_that_are_none_are_none() -> None:
    budget = Budget(need=Need(workers=1, cpus=1))
    values = trial_values(trial(7, math.inf, 2.0, math.nan), METRIC, "min", budget, 12)
    assert values["curve"] == [[10, None], [20, 2.0], [30, None]]
    assert (values["best"], values["last"], values["seconds"], values["cost"]) == (
        2.0,
        None,
        6,
        None,
    )
    unfinished = trial_values(trial(8, status="unfinished"), METRIC, "min", budget, None)
    assert (unfinished["status"], unfinished["best"], unfinished["curve"]) == (
        "unfinished",
        None,
        [],
    )
