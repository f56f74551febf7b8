"""What is said of routers of a real model: even ones, fresh ones, a head that is dead, one that takes all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_crab
import torch
from torch import Tensor

from crab.adapter import InteractionHeads, health, record_routing
from crab.model.crab_model import CrabModel
from crab.model.recompute import recompute_activations

N = 3
LAYERS = 14
"""Two layers with seven linears each."""


@pytest.fixture
def model() -> CrabModel:
    return tiny_crab.model()[0]


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Four samples of different lengths."""
    collate = tiny_crab.model()[2]
    batch: dict[str, Tensor] = collate([tiny_crab.example(i) for i in range(4)])
    assert not batch["attention_mask"].all()
    return batch


def routers(model: CrabModel) -> Iterator[Tensor]:
    return (m.router for m in model.modules() if isinstance(m, InteractionHeads))


@contextmanager
def constant_input(model: CrabModel, module: InteractionHeads) -> Iterator[None]:
    """One module gets 1 in its first channel, whatever the token: what its router has there is its bias."""

    def first_is_one(_module: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[..., 0] = 1
        return (x, *inputs[1:])

    hook = module.register_forward_pre_hook(first_is_one)
    try:
        yield
    finally:
        hook.remove()


def look(model: CrabModel, batch: dict[str, Tensor], *, masked: bool = True) -> dict[str, float]:
    return health.metrics(sums_of(model, batch, masked=masked))


def sums_of(
    model: CrabModel, batch: dict[str, Tensor], *, masked: bool = True
) -> dict[str, Tensor]:
    with record_routing(model) as gates, torch.no_grad():
        model(batch)
    return health.sums(gates, batch["attention_mask"] if masked else None)


def test_routers_that_see_nothing_are_even(model: CrabModel, batch: dict[str, Tensor]) -> None:
    for router in routers(model):
        router.detach().zero_()
    found = look(model, batch)
    assert found["router/entropy"] == pytest.approx(1, abs=1e-6)
    assert found["router/load_max"] == pytest.approx(1, abs=1e-6)
    assert found["router/load_min"] == pytest.approx(1, abs=1e-6)
    assert found["router/dead_heads"] == found["router/collapsed_layers"] == 0


def test_fresh_routers_are_well(model: CrabModel, batch: dict[str, Tensor]) -> None:
    found = look(model, batch)
    print(found)
    assert 0.7 < found["router/entropy"] < 1
    assert found["router/load_min"] > 5 * health.DEAD
    assert found["router/dead_heads"] == found["router/collapsed_layers"] == 0


@pytest.mark.parametrize("number", [0, 9])
def test_a_planted_dead_head_is_counted(
    model: CrabModel, batch: dict[str, Tensor], number: int
) -> None:
    heads = [m for m in model.modules() if isinstance(m, InteractionHeads)][number]
    heads.router.detach().zero_()
    heads.router.detach()[1, 0] = -10
    with constant_input(model, heads):
        found = look(model, batch)
    assert found["router/dead_heads"] == 1
    assert found["router/load_min"] == pytest.approx(N * math.exp(-10) / 2, rel=0.01)
    assert found["router/collapsed_layers"] == 0  # the other two still share


def test_a_planted_collapse_is_counted(model: CrabModel, batch: dict[str, Tensor]) -> None:
    heads = [m for m in model.modules() if isinstance(m, InteractionHeads)][4]
    heads.router.detach().zero_()
    heads.router.detach()[2, 0] = 12
    with constant_input(model, heads):
        found = look(model, batch)
    assert found["router/collapsed_layers"] == 1
    assert found["router/dead_heads"] == 2
    assert found["router/load_max"] == pytest.approx(N, rel=1e-4)
    assert found["router/entropy"] == pytest.approx(
        look(tiny_crab.model()[0], batch)["router/entropy"] * (LAYERS - 1) / LAYERS, abs=0.02
    )


def test_a_token_each_is_a_collapse_without_a_dead_head() -> None:
    """Routers that are sure of each token and use all heads: entropy 0, even loads."""
    gates = {"one": [torch.eye(N).repeat(4, 1).view(2, 6, N)]}
    found = health.metrics(health.sums(gates))
    assert found["router/entropy"] == 0
    assert found["router/collapsed_layers"] == 1
    assert (found["router/dead_heads"], found["router/load_max"]) == (0, pytest.approx(1))


def test_where_it_is_dead_and_where_not() -> None:
    for weight, dead in ((health.DEAD / N * 1.01, 0), (health.DEAD / N * 0.99, 1)):
        gates = {"one": [torch.tensor([[[weight, 0.5, 0.5 - weight]]])]}
        assert health.metrics(health.sums(gates))["router/dead_heads"] == dead


def test_halves_add_up_to_the_whole(model: CrabModel, batch: dict[str, Tensor]) -> None:
    with record_routing(model) as gates, torch.no_grad():
        model(batch)
    mask = batch["attention_mask"]
    whole = health.sums(gates, mask)
    halves = [
        health.sums({name: [calls[0][part]] for name, calls in gates.items()}, mask[part])
        for part in (slice(0, 1), slice(1, 4))  # of unequal size, on purpose
    ]
    added = {name: halves[0][name] + halves[1][name] for name in whole}
    assert all(torch.allclose(added[n], whole[n], rtol=1e-12, atol=0) for n in whole)
    assert health.metrics(added) == pytest.approx(health.metrics(whole), rel=1e-12)


def test_padding_does_not_count(model: CrabModel, batch: dict[str, Tensor]) -> None:
    masked = sums_of(model, batch)
    assert masked["router/tokens"] == batch["attention_mask"].sum()
    everything = sums_of(model, batch, masked=False)
    assert everything["router/tokens"] == batch["attention_mask"].numel()
    assert not torch.allclose(masked["router/entropies"], everything["router/entropies"])
    # Planted at the padding alone: seen only where padding counts.
    padding = batch["attention_mask"] == 0
    gates = torch.full((*padding.shape, N), 1 / N)
    gates[padding] = torch.tensor([1.0, 0.0, 0.0])
    recorded = {"one": [gates]}
    counted = health.metrics(health.sums(recorded, batch["attention_mask"]))
    assert counted["router/load_max"] == pytest.approx(1)
    assert health.metrics(health.sums(recorded))["router/load_max"] > 1.01


def test_recording_over_backward_with_checkpointing_is_refused(
    model: CrabModel, batch: dict[str, Tensor]
) -> None:
    recompute_activations(model)
    with record_routing(model) as gates:
        loss = model(batch)["loss"]
    once = {name: list(calls) for name, calls in gates.items()}
    loss.backward()
    assert {name: len(calls) for name, calls in gates.items()} == dict.fromkeys(once, 1)
    health.sums(gates, batch["attention_mask"])
    with record_routing(model) as gates:
        model(batch)["loss"].backward()
    with pytest.raises(ValueError, match=r"recorded 2 times.*before backward"):
        health.sums(gates, batch["attention_mask"])


def test_one_head_or_none_has_no_choice(batch: dict[str, Tensor]) -> None:
    config = tiny_crab.config()
    single = config.adapter.model_copy(update={"num_heads": 1})
    assert health.has_choice(tiny_crab.model()[0])
    assert not health.has_choice(tiny_crab.model(adapter=single)[0])
    assert not health.has_choice(tiny_crab.model("lora")[0])
    assert not health.has_choice(tiny_crab.model("none")[0])


def test_steps_without_a_look_have_no_metrics() -> None:
    assert health.metrics({"loss": 1.0}) == {}


def test_the_alarm_is_raised_once_and_only_for_what_persists() -> None:
    well = {"router/entropy": 0.9, "router/dead_heads": 0.0, "router/collapsed_layers": 0.0}
    dead = well | {"router/dead_heads": 4.0}
    alarm = health.Alarm()
    # A good look starts the count again; a step without a look does not.
    for values in (dead, dead, well, dead, {"loss": 1.0}, dead):
        assert alarm.look(values) is None
        assert not alarm.raised
    said = alarm.look(dead)
    assert said is not None
    assert said.startswith("4 heads of the adapter")
    for word in ("router_temperature", "num_heads", "learning_rate"):
        assert word in said
    assert alarm.raised
    assert [alarm.look(values) for values in (dead, dead, dead, well)] == [None] * 4
    collapsed = health.Alarm()
    told = [collapsed.look(well | {"router/collapsed_layers": 2.0}) for _ in range(health.LOOKS)]
    assert told[:-1] == [None] * (health.LOOKS - 1)
    assert "2 routers give each token to one head" in str(told[-1])
