"""Search spaces: what may stand in one, which values it takes, and that its ranges are what they say."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from crab.model.config import ALL_LINEAR, AdapterConfig
from jobs.spec_train import Optimisation
from tune_spaces.space import Parameter, Space, describe, load_space, settings

SHIPPED = ["adapter", "heads_and_temperature", "optim"]
STEPS = Space(
    name="steps",
    about="Of every kind.",
    parameters={
        "whole": Parameter("a.whole", IntDistribution(2, 10, step=4), ""),
        "part": Parameter("a.part", FloatDistribution(0.0, 0.5, step=0.1), ""),
        "rate": Parameter("a.rate", FloatDistribution(1e-4, 1e-2, log=True), ""),
        "word": Parameter("a.word", CategoricalDistribution(["x", 1]), "", {"x": [1, 2], 1: None}),
    },
)


def draw(space: Space, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """What Optuna draws from a space at random."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    ranges = {name: parameter.distribution for name, parameter in space.parameters.items()}
    return [study.ask(ranges).params for _ in range(number)]


def unevenness(values: Sequence[float], low: float, high: float) -> float:
    """The largest distance between the share of logarithms below a place and what it is when all are as likely."""
    places = np.sort((np.log(values) - math.log(low)) / (math.log(high) - math.log(low)))
    ranks = np.arange(len(places) + 1) / len(places)
    return float(max(np.max(ranks[1:] - places), np.max(places - ranks[:-1])))


def test_the_shipped_spaces_by_parameter() -> None:
    assert describe(load_space(["heads_and_temperature"])) == {
        "num_heads": {"kind": "int", "low": 1, "high": 8, "log": False},
        "router_temperature": {"kind": "float", "low": 0.1, "high": 10.0, "log": True},
    }
    adapter = describe(load_space(["adapter"]))
    assert adapter["r"] == {"kind": "int", "low": 2, "high": 32, "log": True}
    assert adapter["targets"] == {"kind": "choice", "choices": ["attention", "feed_forward", "all"]}
    assert describe(STEPS)["whole"] == {
        "kind": "int",
        "low": 2,
        "high": 10,
        "log": False,
        "step": 4,
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_every_draw_of_optuna_is_taken(name: str) -> None:
    space = load_space([name])
    assert space.name == name
    for config in draw(space, 50):
        found = settings(space, config)
        assert list(found) == [space.parameters[parameter].path for parameter in config]


def test_plain_crab_lies_in_every_space() -> None:
    plain, learning = AdapterConfig(), Optimisation(steps=1, batch_size=1)
    assert (plain.num_heads, plain.r, plain.router_temperature) == (3, 8, 1)
    found = settings(
        load_space(SHIPPED),
        {
            "num_heads": plain.num_heads,
            "router_temperature": plain.router_temperature,
            "r": plain.r,
            "lora_alpha": plain.lora_alpha,
            "lora_dropout": plain.lora_dropout,
            "targets": "all",
            "learning_rate": learning.learning_rate,
            "warmup_ratio": learning.warmup_ratio,
            "weight_decay": learning.weight_decay,
        },
    )
    assert len(found) == sum(len(load_space([name]).parameters) for name in SHIPPED)
    assert found["model.set.adapter.target_modules"] == list(ALL_LINEAR)


def test_the_temperature_is_drawn_evenly_by_its_logarithm() -> None:
    space = load_space(["heads_and_temperature"])
    drawn = [config["router_temperature"] for config in draw(space, 1000)]
    # 1.63 / sqrt(1000): more happens to one even thousand in a hundred, by Kolmogorov and Smirnov.
    assert unevenness(drawn, 0.1, 10) < 0.0515
    generator = random.Random(0)
    uniform = [generator.uniform(0.1, 10) for _ in range(1000)]
    assert unevenness(uniform, 0.1, 10) > 0.3


def test_each_number_of_heads_is_drawn() -> None:
    space = load_space(["heads_and_temperature"])
    assert {config["num_heads"] for config in draw(space, 200)} == set(range(1, 9))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_number_is_taken_inside_its_range_alone(value: float) -> None:
    space = load_space(["heads_and_temperature"])
    if 0.1 <= value <= 10:
        taken = settings(space, {"router_temperature": value})
        assert taken == {"model.set.adapter.router_temperature": value}
    else:
        with pytest.raises(ValueError, match=r"router_temperature .* from 0\.1 to 10"):
            settings(space, {"router_temperature": value})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"whole": 4}, "whole = 4 is outside its range: expected a whole number from 2 to 10 in s"),
        ({"whole": 14}, "whole = 14"),
        ({"whole": 6.0}, r"whole = 6\.0 .* a whole number"),
        ({"whole": True}, "whole = True"),
        ({"whole": "6"}, "whole = '6'"),
        ({"part": 0.25}, r"part = 0\.25 .* in steps of 0\.1"),
        ({"rate": 0}, "rate = 0 is outside"),
        ({"rate": None}, "rate = None"),
        ({"word": "y"}, "word = 'y' is outside its range: expected one of 'x', 1"),
        ({"word": True}, "word = True"),
        ({"words": "x"}, "no such parameter; did you mean 'word'. known are whole, part, rate"),
        ({"zzz": 1}, "no such parameter; known are"),
    ],
)
def test_what_a_space_does_not_take(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings(STEPS, config)


def test_true_is_no_number() -> None:
    with pytest.raises(ValueError, match="num_heads = True is outside its range"):
        settings(load_space(["heads_and_temperature"]), {"num_heads": True})


def test_values_come_out_as_plain_ones_at_their_paths() -> None:
    drawn = {"whole": np.int64(6), "part": 0.1 + 0.2, "rate": np.float32(0.001), "word": "x"}
    found = settings(STEPS, drawn)
    assert found == {
        "a.whole": 6,
        "a.part": 0.1 + 0.2,
        "a.rate": float(np.float32(0.001)),
        "a.word": [1, 2],
    }
    assert [type(value) for value in found.values()] == [int, float, float, list]
    found["a.word"].append(3)  # what a caller does to a sample does not reach the space
    assert settings(STEPS, {"word": "x"}) == {"a.word": [1, 2]}
    assert settings(STEPS, {"word": 1}) == {"a.word": None}
    assert settings(STEPS, {}) == {}


def test_spaces_together() -> None:
    both = load_space(["heads_and_temperature", "adapter"])
    assert both.name == "heads_and_temperature+adapter"
    assert list(both.parameters) == [
        "num_heads",
        "router_temperature",
        "r",
        "lora_alpha",
        "lora_dropout",
        "targets",
    ]
    assert both.changes_shapes == {"num_heads", "r", "targets"}
    assert load_space(["optim"]).changes_shapes == set()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "at least one space; there are adapter, heads_and_temperature, optim"),
        (["adaptr"], "no space 'adaptr'; did you mean 'adapter'. known are adapter, heads"),
        (["space"], "no space 'space'"),
        (["__init__"], "no space '__init__'"),
        (["optim", "optim"], "learning_rate, warmup_ratio, weight_decay of optim is in a space b"),
        (["nowhere.py"], "nowhere.py: there is no such file"),
    ],
)
def test_spaces_that_cannot_be_loaded(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_space(names)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from optuna.distributions import IntDistribution
from tune_spaces.space import Parameter, Space

@dataclass
class Mine:
    low: int

SPACE = Space("mine", "Mine.", {"steps": Parameter("PATH", IntDistribution(Mine(3).low, 9), "")})
"""


def test_a_space_of_your_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN.replace("PATH", "optimisation.steps"))
    both = load_space([str(mine), "optim"])
    assert both.name == "mine+optim"
    assert settings(both, {"steps": 3}) == {"optimisation.steps": 3}
    # Another name, and the same place in the spec.
    mine.write_text(OWN.replace("PATH", "optimisation.learning_rate"))
    with pytest.raises(
        ValueError, match=r"steps \(optimisation\.learning_rate\) and learning_rate"
    ):
        load_space([str(mine), "optim"])
    # A place around that of another: one of the two would be lost.
    mine.write_text(OWN.replace("PATH", "optimisation"))
    with pytest.raises(ValueError, match="at the same place"):
        load_space(["optim", str(mine)])
    # One that merely begins alike is another place.
    mine.write_text(OWN.replace("PATH", "optimisation.learning_rate_of_mine"))
    assert "steps" in load_space(["optim", str(mine)]).parameters


@pytest.mark.parametrize(("text", "said"), [("a = 1", "SPACE is absent"), ("SPACE = 1", "is 1;")])
def test_a_file_without_a_space(tmp_path: Path, text: str, said: str) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_space([str(mine)])


def test_spaces_that_cannot_be() -> None:
    choice = CategoricalDistribution(["x", "y"])
    with pytest.raises(ValueError, match="given for 'x', while the choices are 'x', 'y'"):
        Parameter("a", choice, "", {"x": 1})
    with pytest.raises(ValueError, match="while the choices are a range of numbers"):
        Parameter("a", IntDistribution(1, 2), "", {1: 1, 2: 2})
    with pytest.raises(ValueError, match="changes_shapes names z, which is no parameter"):
        Space("s", "", {"a": Parameter("a", choice, "")}, frozenset({"z"}))
