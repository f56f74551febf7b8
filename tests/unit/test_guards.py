"""Which steps the guard lets pass, and that it decides after a resume as if there had been none."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from crab_platform.guards import Gate, Guard, SkippedTooOftenError


def values(loss: float, norm: float = 1.0) -> dict[str, float]:
    return {"loss": loss, "gradient_norm": norm}


def fed(guard: Guard, steps: int, seed: int = 0) -> Guard:
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        seen = values(2.0 + draw.gauss(0, 0.1), 1.0 + draw.gauss(0, 0.05))
        guard.note(step, seen, guard.objection(seen))
    return guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_what_is_no_number_is_refused_from_the_first_step(name: str, bad: float) -> None:
    assert name in str(Guard().objection(values(1.0) | {name: bad}))


@pytest.mark.parametrize("seed", range(10))
def test_500_clean_steps_give_no_alarm(seed: int) -> None:
    assert fed(Guard(), 500, seed).skipped_steps == 0


def test_a_spike_is_refused_and_does_not_hide_the_next() -> None:
    guard = fed(Guard(), 128)
    for step, spike in ((129, values(4.0)), (130, values(2.0, 3.0))):
        reason = guard.objection(spike)
        assert reason is not None
        guard.note(step, spike, reason)
    assert (guard.in_a_row, guard.skipped_steps, guard.last_good_step) == (2, 2, 128)
    assert guard.objection(values(2.0)) is None


def test_few_steps_make_no_spike() -> None:
    assert fed(Guard(), 63).objection(values(100.0)) is None
    assert fed(Guard(), 64).objection(values(100.0)) is not None


def test_the_third_in_a_row_ends_it_and_a_good_one_starts_anew() -> None:
    guard, bad = fed(Guard(), 7), values(float("nan"))
    for step in (8, 9):
        guard.note(step, bad, "bad")
    guard.note(10, values(2.0), None)
    for step in (11, 12):
        guard.note(step, bad, "bad")
    with pytest.raises(SkippedTooOftenError, match="last good step is 10"):
        guard.note(13, bad, "bad")


def test_a_guard_from_json_decides_as_the_one_that_was_never_stopped() -> None:
    guard, again = fed(Guard(), 100), Guard()
    again.load(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert fed(again, 50, 1).state() == fed(guard, 50, 1).state()


def test_a_closed_gate_moves_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1)
    holder = SimpleNamespace(_global_grad_norm=torch.tensor(2.0))
    gate = Gate(SimpleNamespace(basic_optimizer=adam, optimizer=holder))
    for verdict in (True, False):
        asked: list[float | None] = []
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        gate.arm(lambda norm, verdict=verdict, asked=asked: asked.append(norm) or verdict)  # type: ignore[misc]
        adam.step()
        adam.step()  # one engine step, two shard groups
        assert asked == [2.0]
        assert gate.passed() is verdict
        assert torch.equal(before, weight) is not verdict
        assert int(adam.state[weight]["step"]) == 2
