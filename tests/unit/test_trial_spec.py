"""Samples of a sweep: every one of a shipped space is a train spec, and those that cannot be are turned down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from transformers import LlamaConfig

from crab.model.build import build_model
from crab.model.config import AdapterConfig
from crab.model.llm import load_tokenizer
from crab.model.meta import meta_model
from jobs.plan_memory import memory_of
from jobs.presets import crab_model_config
from jobs.spec import SpecError, TrainSpec, TuneSpec, load_spec, parse_spec
from jobs.trial_spec import examine, trial_spec
from tune_spaces.space import Parameter, Space, load_space

SHIPPED = ["adapter", "heads_and_temperature", "optim"]
ALL = load_space(SHIPPED)
LAYERS = 4
WIDTH, INNER = 192, 512  # of the tiny preset's language model
SHAPES = {  # target -> (in, out)
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, WIDTH),
    "v_proj": (WIDTH, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, INNER),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
}


def train_spec(**changes: Any) -> TrainSpec:
    spec = parse_spec(
        {
            "job": "train",
            "name": "a",
            "data": [{"name": "d", "samples": "samples.jsonl"}],
            "features": {"cache": "cache", "manifest": "prep"},
            "optimisation": {"steps": 2, "batch_size": 16, "sampling": "balanced"},
            "workers": {"count": 2, "micro_batches": 2, "zero_stage": 2},
        }
        | changes
    )
    assert isinstance(spec, TrainSpec)
    return spec


def samples(space: Space) -> st.SearchStrategy[dict[str, Any]]:
    """Any sample of a space, its ends more often than a sampler would."""

    def values(parameter: Parameter) -> st.SearchStrategy[Any]:
        chosen = parameter.distribution
        if isinstance(chosen, CategoricalDistribution):
            return st.sampled_from(chosen.choices)
        if isinstance(chosen, IntDistribution):
            return st.integers(chosen.low, chosen.high)
        return st.floats(chosen.low, chosen.high)

    return st.fixed_dictionaries({name: values(p) for name, p in space.parameters.items()})


def adapter_weights(adapter: AdapterConfig) -> int:
    """Of A (r x in), the router (heads x in) and the B's (heads of out x r), in every layer."""
    of_layer = 0
    for target in adapter.target_modules:
        inputs, outputs = SHAPES[target]
        of_layer += adapter.r * inputs
        of_layer += adapter.num_heads * inputs
        of_layer += adapter.num_heads * outputs * adapter.r
    return LAYERS * of_layer


def one(path: str, distribution: Any, values: Any = None) -> Space:
    """A space of one parameter, `x`."""
    return Space("planted", "", {"x": Parameter(path, distribution, "", values)})


@pytest.mark.parametrize("names", [[name] for name in SHIPPED] + [SHIPPED], ids="+".join)
def test_every_sample_is_a_train_spec(names: list[str]) -> None:
    space = load_space(names)
    train = train_spec()
    others = examine(train_spec(model={"set": {"adapter": {"method": "none"}}})).trained_parameters

    @given(samples(space))
    @hypothesis_settings(max_examples=40, deadline=None)
    def holds(config: dict[str, Any]) -> None:
        spec = trial_spec(train, space, config)
        adapter = crab_model_config(spec.model).adapter
        for name in ("num_heads", "router_temperature", "r", "lora_alpha", "lora_dropout"):
            assert getattr(adapter, name) == config.get(name, getattr(TINY.adapter, name))
        for name in ("learning_rate", "warmup_ratio", "weight_decay"):
            learning = spec.optimisation
            assert getattr(learning, name) == config.get(name, getattr(train.optimisation, name))
        # Nothing else moves, and the spec is one that a file could hold.
        kept = {"model", "optimisation"}
        assert spec.model_dump(exclude=kept) == train.model_dump(exclude=kept)
        assert parse_spec(spec.model_dump(mode="json")) == spec
        examined = examine(spec, memory_bytes=2_000_000_000)
        assert examined.objection is None
        assert examined.trained_parameters == others + adapter_weights(adapter)

    holds()


TINY = crab_model_config(train_spec().model)


def test_a_sample_leaves_the_spec_that_it_came_from_alone() -> None:
    train = train_spec(model={"set": {"adapter": {"r": 4, "lora_alpha": 8.0}}})
    before = train.model_copy(deep=True)
    spec = trial_spec(train, ALL, {"num_heads": 5, "targets": "attention"})
    assert train == before
    assert spec.model.set["adapter"] == {
        "r": 4,
        "lora_alpha": 8.0,
        "num_heads": 5,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    assert trial_spec(train, ALL, {}) == train


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 1, "r": 2, "targets": "attention"},
        {"num_heads": 8, "r": 32, "targets": "all", "lora_dropout": 0.1},
        {"num_heads": 3, "r": 8, "targets": "feed_forward", "router_temperature": 0.1},
    ],
    ids=["smallest", "largest", "between"],
)
def test_what_is_counted_is_what_a_built_model_has(config: dict[str, Any]) -> None:
    spec = trial_spec(train_spec(), ALL, config)
    settings = crab_model_config(spec.model)
    model = build_model(settings, load_tokenizer(str(settings.llm.path)))
    built = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert examine(spec).trained_parameters == built


@pytest.mark.parametrize("method", ["interaction_lora", "lora", "none"])
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_counts_and_memory_are_those_of_the_plan(method: str, preset: str) -> None:
    for workers in (
        {"count": 2, "zero_stage": 3, "gpu": True, "offload": "optimizer"},
        {"count": 4, "zero_stage": 2, "activation_checkpointing": True},
    ):
        model = {"preset": preset, "set": {"adapter": {"method": method, "r": 6, "num_heads": 2}}}
        spec = train_spec(workers=workers, model=model)
        planned = memory_of(spec)
        column = next(c for c in planned["by_workers"] if c["workers"] == spec.workers.count)
        kept = (
            "activations_checkpointed" if spec.workers.activation_checkpointing else "activations"
        )
        examined = examine(spec)
        assert examined.trained_parameters == planned["trained"]
        assert examined.memory_bytes == column["together"] + column[kept]


def test_the_shapes_of_one_sample_do_not_stay_for_the_next() -> None:
    for heads in (2, 6, 2):
        spec = train_spec(
            model={"set": {"adapter": {"num_heads": heads, "method": "lora", "r": heads}}}
        )
        whole = meta_model(crab_model_config(spec.model))
        trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        assert examine(spec).trained_parameters == trained


@pytest.mark.parametrize(
    ("space", "value", "said"),
    [
        (
            one("model.set.adapter.num_heads", IntDistribution(0, 4)),
            0,
            r"sample \{'x': 0\} of space planted: model\.set: 1 problem.*\n  adapter\.num_heads: .*greater than 0",
        ),
        (
            one("model.set.adapter.num_head", IntDistribution(1, 4)),
            2,
            r"adapter\.num_head: unknown key; did you mean 'num_heads'",
        ),
        (
            one("optimisation.learning_rat", FloatDistribution(1e-4, 1e-3)),
            1e-3,
            r"optimisation\.learning_rat: unknown key; did you mean 'learning_rate'",
        ),
        (
            one("optimisation.warmup_ratio", FloatDistribution(0, 2)),
            1.5,
            r"optimisation\.warmup_ratio: Input should be less than or equal to 1",
        ),
        (one("name.length", IntDistribution(1, 4)), 2, "name is 'a', not a mapping"),
        (one("model.set.adapter.r", IntDistribution(1, 4)), 5, "space planted: x = 5 is outside"),
        (
            one("job", CategoricalDistribution(["train", "synth"])),
            "synth",
            "features: unknown key",
        ),
    ],
)
def test_samples_that_are_no_train_spec(space: Space, value: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        trial_spec(train_spec(), space, {"x": value})


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("lora", {"r": 4}, None),
        ("lora", {"router_temperature": 2.0}, r"adapter\.router_temperature does nothing .* lora"),
        ("lora", {"r": 4, "num_heads": 2}, r"adapter\.num_heads does nothing"),
        ("none", {"r": 4}, r"adapter\.r does nothing with model\.set\.adapter\.method none"),
        ("none", {"learning_rate": 1e-3}, None),
    ],
)
def test_a_sweep_over_what_does_nothing_is_refused(
    method: str, config: dict[str, Any], said: str | None
) -> None:
    train = train_spec(model={"set": {"adapter": {"method": method}}})
    if said is None:
        trial_spec(train, ALL, config)
    else:
        with pytest.raises(SpecError, match=said):
            trial_spec(train, ALL, config)


def test_a_sweep_over_the_method_has_samples_without_heads() -> None:
    methods = CategoricalDistribution(["interaction_lora", "lora"])
    space = Space(
        "s",
        "",
        {
            "method": Parameter("model.set.adapter.method", methods, ""),
            "heads": Parameter("model.set.adapter.num_heads", IntDistribution(1, 8), ""),
        },
    )
    spec = trial_spec(train_spec(), space, {"method": "lora", "heads": 4})
    assert examine(spec).objection is None


def objection(**changes: Any) -> str:
    examined = examine(train_spec(**changes))
    assert examined.objection is not None
    assert "\n" not in examined.objection
    assert (examined.trained_parameters, examined.memory_bytes) == (0, None)
    return examined.objection


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"num_heads": 0}, ["model.set", "adapter.num_heads", "greater than 0"]),
        ({"target_modules": ["q_prj"]}, ["target_modules", "'q_prj' matches no", "q_proj"]),
        ({"method": "lora", "target_modules": ["v_proj", "up"]}, ["'up' matches no linear layer"]),
        ({"target_modules": ["mlp"]}, ["'mlp' matches no linear layer"]),
        ({"target_modules": []}, ["target_modules is empty"]),
        ({"r": 193}, ["adapter.r is 193", "(192 x 192)", "take r up to 192"]),
        ({"r": 193, "method": "lora", "target_modules": ["up_proj"]}, ["(512 x 192)", "up to 192"]),
    ],
)
def test_adapters_that_do_not_fit(adapter: dict[str, Any], said: list[str]) -> None:
    found = objection(model={"set": {"adapter": adapter}})
    for part in said:
        assert part in found
    limit = {"r": 192, "target_modules": ["q_proj"]}
    assert examine(train_spec(model={"set": {"adapter": limit}})).objection is None


def test_a_rank_is_held_against_the_narrowest_of_its_layers(tmp_path: Path) -> None:
    # Two heads of keys for eight of queries: k_proj gives 16 numbers, and q_proj 64.
    LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)
    adapter = {"r": 17, "target_modules": ["q_proj", "k_proj"]}
    found = objection(model={"llm": str(tmp_path), "set": {"adapter": adapter}})
    assert "layers.0.self_attn.k_proj (16 x 64)" in found
    assert "take r up to 16, or leave k_proj out" in found
    adapter["target_modules"] = ["q_proj"]
    spec = train_spec(model={"llm": str(tmp_path), "set": {"adapter": adapter}})
    assert examine(spec).objection is None


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    found = objection(optimisation={"steps": 1, "batch_size": 6})
    assert "batch_size 6 does not divide by workers.count x workers.micro_batches = 4" in found


def test_more_memory_than_there_is_is_refused() -> None:
    spec = train_spec(model={"preset": "paper", "set": {"adapter": {"r": 32, "num_heads": 8}}})
    needed = examine(spec)
    assert needed.objection is None
    assert needed.memory_bytes is not None
    assert examine(spec, needed.memory_bytes) == needed
    refused = examine(spec, needed.memory_bytes - 1)
    assert refused.objection is not None
    for said in (
        "model.set.adapter interaction_lora, r 32, num_heads 8",
        f"{needed.trained_parameters:,} trained",
        "micro batches of 4",
        "each of 2 workers",
        f"{needed.memory_bytes / 1e9:.3g} GB",
        "more workers.micro_batches, or workers.activation_checkpointing: true, or workers.zero_stage: 3",
    ):
        assert said in refused.objection
    assert refused.trained_parameters == needed.trained_parameters
    assert refused.memory_bytes == needed.memory_bytes


def test_the_fewest_workers_that_may_be_hold_the_most() -> None:
    def memory(**workers: Any) -> int:
        spec = train_spec(
            optimisation={"steps": 1, "batch_size": 24},
            workers={"micro_batches": 3, "zero_stage": 3, "gpu": True} | workers,
        )
        found = examine(spec)
        assert found.memory_bytes is not None
        return found.memory_bytes

    assert memory(count=4, min_count=2) > memory(count=4)
    # Two workers of six parts each take micro batches as large as four workers of three.
    assert memory(count=4, min_count=2) == memory(count=2, micro_batches=6)


def test_a_language_model_of_another_kind() -> None:
    gpt2 = {"model_type": "gpt2", "vocab_size": 400, "n_embd": 48, "n_layer": 1, "n_head": 2}
    adapter = {"target_modules": ["lm_head"]}
    changes = {"llm": {"path": None, "architecture": gpt2}, "adapter": adapter}
    spec = train_spec(model={"set": changes})
    found = examine(spec)
    assert found.objection is None
    assert found.memory_bytes is None
    # What is known is above the limit already.
    refused = examine(spec, 1_000_000)
    assert "activations unknown" in str(refused.objection)


def test_without_the_language_model_nothing_is_known(tmp_path: Path) -> None:
    spec = train_spec(model={"llm": str(tmp_path / "absent")})
    with pytest.raises(SpecError, match=r"absent has no config\.json, which the sizes are taken"):
        examine(spec)


def test_a_damaged_preset_is_no_fault_of_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.presets.TINY", tmp_path)
    with pytest.raises(SpecError, match="the preset is damaged"):
        examine(train_spec())


def test_the_sizes_of_the_paper_preset_need_no_weights() -> None:
    spec = trial_spec(train_spec(model={"preset": "paper"}), ALL, {"num_heads": 5, "r": 8})
    plain = trial_spec(train_spec(model={"preset": "paper"}), ALL, {})
    # tests/unit/test_paper_shapes.py has both, of the adapter alone.
    more = examine(spec).trained_parameters - examine(plain).trained_parameters
    assert more == 69_197_824 - 45_162_496


@pytest.mark.parametrize("name", ["tune-heads", "tune-population"])
def test_shipped_sweeps_are_specs_whose_samples_can_be(name: str) -> None:
    spec = load_spec(f"jobs/specs/{name}.yaml")
    assert isinstance(spec, TuneSpec)
    space = load_space(spec.space)
    for sample in (*spec.search.first, *spec.confirm.compare.values()):
        assert examine(trial_spec(spec.train, space, sample)).objection is None
