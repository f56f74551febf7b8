"""Sampling by task: shares, order within a task, and that nothing but (seed, step) decides."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crab.train import balanced_indices

TASKS = ["avqa"] * 100 + ["s4"] * 7 + ["ave"] * 33


def draws(steps: int, batch: int, weights: dict[str, float] | None = None) -> list[int]:
    return [i for step in range(steps) for i in balanced_indices(1, step, batch, TASKS, weights)]


def counts(indices: list[int]) -> Counter[str]:
    return Counter(TASKS[index] for index in indices)


def test_every_task_takes_an_equal_part_of_every_batch() -> None:
    for step in range(100):
        batch = counts(balanced_indices(1, step, 12, TASKS))
        assert all(3 <= batch[task] <= 5 for task in ("avqa", "s4", "ave"))
    assert max(counts(draws(250, 12)).values()) - min(counts(draws(250, 12)).values()) <= 3


def test_weights_are_relative_and_zero_leaves_out() -> None:
    found = counts(draws(125, 8, {"avqa": 6, "s4": 2, "ave": 0}))
    assert found == {"avqa": 750, "s4": 250}
    assert draws(20, 8, {"avqa": 6, "s4": 2, "ave": 1}) == draws(
        20, 8, {"avqa": 0.6, "s4": 0.2, "ave": 0.1}
    )
    assert counts(draws(125, 8, {"avqa": 1, "s4": 1e-6, "ave": 1}))["s4"] == 1


def test_each_sample_of_a_task_comes_once_before_any_comes_again() -> None:
    drawn = [index for index in draws(100, 12) if TASKS[index] == "s4"]
    rounds = [drawn[start : start + 7] for start in range(0, len(drawn) - 7, 7)]
    assert all(sorted(part) == list(range(100, 107)) for part in rounds)
    assert len({tuple(part) for part in rounds}) > 5  # another order each time


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(0, 2**32))
def test_the_sequence_does_not_depend_on_where_it_is_cut(batch: int, seed: int) -> None:
    steps = 24
    cut = [i for s in range(steps * 7) for i in balanced_indices(seed, s, batch, TASKS)]
    whole = [i for s in range(steps * batch) for i in balanced_indices(seed, s, 7, TASKS)]
    assert cut == whole


def test_another_process_draws_the_same() -> None:
    code = "from crab.train import *; print(balanced_indices(7, 90, 16, ['a'] * 9 + ['b'] * 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(balanced_indices(7, 90, 16, ["a"] * 9 + ["b"] * 3))
    assert draws(3, 8) != [i for s in range(3) for i in balanced_indices(2, s, 8, TASKS)]


@pytest.mark.parametrize(
    "weights",
    [
        {"avqa": 1.0},
        {"avqa": 1.0, "s4": 1.0, "ave": 1.0, "avss": 1.0},
        {"avqa": 1.0, "s4": -1.0, "ave": 1.0},
        {"avqa": 0.0, "s4": 0.0, "ave": 0.0},
        {"avqa": float("nan"), "s4": 1.0, "ave": 1.0},
        {"avqa": float("inf"), "s4": 1.0, "ave": 1.0},
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sampling weights"):
        balanced_indices(1, 0, 4, TASKS, weights)


def test_a_step_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        balanced_indices(1, 0, 4, [])
