"""Order, schedule, seeds and bookkeeping: functions of their arguments and of nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crab.train import (
    add_losses,
    batch_indices,
    cosine_lr,
    epoch_order,
    losses_by_task,
    mean_losses,
    micro_batches,
    optimizer_step,
    parameter_groups,
    rank_slice,
    seeded,
    step_seed,
)

_ROOT = Path(__file__).resolve().parents[2]


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), size=st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    order = epoch_order(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    np.testing.assert_array_equal(order, epoch_order(seed, epoch, size))


def test_the_order_is_pinned() -> None:
    """A run that resumes with a newer version must see the order that it began with."""
    assert epoch_order(42, 0, 10).tolist() == [4, 3, 6, 8, 1, 9, 5, 2, 0, 7]
    assert epoch_order(42, 1, 10).tolist() != epoch_order(42, 0, 10).tolist()
    assert epoch_order(43, 0, 10).tolist() != epoch_order(42, 0, 10).tolist()


def test_order_and_seeds_are_the_same_in_another_process() -> None:
    code = "from crab.train import *; print(batch_indices(7, 5, 4, 9), step_seed(1, 2, 3))"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_ROOT
    ).stdout
    assert other.strip() == f"{batch_indices(7, 5, 4, 9)} {step_seed(1, 2, 3)}"


@given(
    size=st.integers(1, 40), batch=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0)
)
def test_every_sample_comes_once_an_epoch(size: int, batch: int, epochs: int, seed: int) -> None:
    steps = -(-size * epochs // batch)
    drawn = [i for step in range(steps) for i in batch_indices(seed, step, batch, size)]
    assert len(drawn) == steps * batch
    for epoch in range(epochs):
        assert Counter(drawn[epoch * size : (epoch + 1) * size]) == Counter(range(size))


@given(ranks=st.integers(1, 8), each=st.integers(1, 6))
def test_ranks_share_a_batch_without_overlap(ranks: int, each: int) -> None:
    indices = list(range(100, 100 + ranks * each))
    parts = [rank_slice(indices, rank, ranks) for rank in range(ranks)]
    assert [index for part in parts for index in part] == indices
    assert {len(part) for part in parts} == {each}


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 samples does not divide by 3"):
        rank_slice(list(range(10)), 0, 3)
    with pytest.raises(ValueError, match="rank must lie"):
        rank_slice([1, 2], 2, 2)
    with pytest.raises(ValueError, match="samples >= 1"):
        batch_indices(0, 0, 4, 0)


def test_micro_batches_keep_all_and_their_order() -> None:
    assert micro_batches([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]


def test_schedule_rises_peaks_and_falls() -> None:
    rates = [cosine_lr(step, num_steps=100, peak=1e-4, warmup=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(1e-5)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert max(rates) == rates[10] == pytest.approx(1e-4)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(5e-5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert cosine_lr(500, num_steps=100, peak=1.0, floor=0.1) == pytest.approx(0.1)
    assert cosine_lr(0, num_steps=1, peak=1.0, warmup=0.0) == 1.0
    with pytest.raises(ValueError, match="num_steps=0"):
        cosine_lr(0, num_steps=0, peak=1.0)


def test_dropout_seed_knows_places_not_ranks() -> None:
    """Global batch 8 in micro-batches of 2: one rank's and two ranks' seeds are the same four."""
    one = [step_seed(3, 9, position) for position in range(0, 8, 2)]
    two = [step_seed(3, 9, rank * 4 + offset) for rank in range(2) for offset in (0, 2)]
    assert one == two
    assert len({step_seed(s, t, p) for s in range(3) for t in range(3) for p in range(3)}) == 27
    assert all(0 <= seed < 2**63 for seed in one)


def test_seeded_gives_the_state_back() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(5):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(5):
        assert torch.equal(torch.rand(2), inside)


def test_losses_of_parts_add_up_by_task() -> None:
    first = losses_by_task(
        ["ave", "avqa", "ave"], torch.tensor([3.0, 8.0, 1.0]), torch.tensor([1, 2, 3])
    )
    second = losses_by_task(["avqa"], torch.tensor([4.0]), torch.tensor([4]))
    means = mean_losses(add_losses([first, second]))
    assert means == {"ave": 1.0, "avqa": 2.0, "all": 1.6}
    with pytest.raises(ValueError, match="zip"):
        losses_by_task(["ave"], torch.zeros(2), torch.ones(2))


def test_decay_is_off_unless_asked_for_and_spares_norms() -> None:
    parameters = {"b.weight": nn.Parameter(torch.ones(2, 2)), "a.norm": nn.Parameter(torch.ones(2))}
    (group,) = parameter_groups(parameters)
    assert group["weight_decay"] == 0
    assert [p.ndim for p in group["params"]] == [1, 2]
    decayed, spared = parameter_groups(parameters, weight_decay=0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"][0] is parameters["b.weight"]
    with pytest.raises(ValueError, match="no trainable"):
        parameter_groups({})


class _Line(nn.Module):
    """y = w x on 'labels' that are all supervised, with dropout: the smallest model of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: dict, normalizer: float, mask_normalizer: float) -> dict:
        per_sample = (self.dropout(batch["x"]) * self.weight).sum(1)
        return {"loss": per_sample.sum() / normalizer, "sample_loss": per_sample}


def _batch(*rows: float) -> dict:
    x = torch.tensor(rows).unsqueeze(1).expand(-1, 3)
    return {"x": x, "labels": torch.ones(len(rows), 4, dtype=torch.long)}


def test_accumulated_step_equals_the_whole_and_repeats_with_its_seeds() -> None:
    def step(batches: list, *, seeds: list | None = None, train: bool = False) -> float:
        model = _Line().train(train)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer_step(model, batches, optimizer, lr=0.5, max_grad_norm=1e9, seeds=seeds)
        return model.weight.item()

    whole = step([_batch(1.0, 2.0, 6.0)])
    assert whole == pytest.approx(2 - 0.5 * (9 * 3) / 9)
    assert step([_batch(1.0), _batch(2.0, 6.0)]) == pytest.approx(whole)
    noisy = [_batch(*np.arange(50.0)), _batch(*np.arange(50.0))]
    assert step(noisy, seeds=[1, 2], train=True) == step(noisy, seeds=[1, 2], train=True)
    assert step(noisy, seeds=[1, 2], train=True) != step(noisy, seeds=[1, 3], train=True)


def test_a_gradient_that_is_not_finite_stops_and_changes_nothing() -> None:
    model = _Line().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(FloatingPointError, match="gradient norm"):
        optimizer_step(model, [_batch(float("inf"))], optimizer, lr=0.5)
    assert model.weight.item() == 2.0
