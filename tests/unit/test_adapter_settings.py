"""What an adapter is put on and with which settings: what is accepted, refused, written and
registered.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import InteractionLoraConfig, InteractionLoraLinear

IDS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def tiny_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def ours(**settings: object) -> PeftConfig:
    return InteractionLoraConfig(**settings)  # type: ignore[arg-type]


def randomise(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Fill an adapter's weights, as training would; at the start it is a no-op, which hides
    errors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_config_survives_its_file_and_the_file_is_stable(tmp_path: Path) -> None:
    config = ours(num_heads=4, r=2, lora_alpha=3, lora_dropout=0.2, router_temperature=2.5)
    config.save_pretrained(str(tmp_path / "a"))
    loaded = PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert isinstance(loaded, InteractionLoraConfig)
    assert loaded.to_dict() == config.to_dict()
    loaded.save_pretrained(str(tmp_path / "b"))
    files = [(tmp_path / d / "adapter_config.json").read_bytes() for d in "ab"]
    assert files[0] == files[1]
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin.peft_type is config.peft_type


def test_regex_exclusion_and_all_linear_choose_targets() -> None:
    def adapted(config: PeftConfig) -> set[str]:
        model = get_peft_model(tiny_llama(), config)
        layers = model.named_modules()
        names = (n for n, m in layers if isinstance(m, InteractionLoraLinear))
        return {name.removeprefix("base_model.model.model.") for name in names}

    assert adapted(ours(target_modules=r".*layers\.1\..*\.(q|v)_proj")) == {
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.v_proj",
    }
    assert adapted(ours(target_modules=["layers.0.self_attn.k_proj"])) == {
        "layers.0.self_attn.k_proj"
    }
    assert adapted(
        ours(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"])
    ) == {"layers.1.self_attn.q_proj"}
    assert len(adapted(ours(target_modules="all-linear"))) == 14


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "v_prj", "kproj"], ["'v_prj'", "v_proj", "'kproj'", "k_proj"]),
        (["q_proj", "layers.7.self_attn.q_proj"], ["layers.7.self_attn.q_proj", "layers.1.self"]),
        (["zzz"], ["'zzz'", "q_proj"]),
        (r".*\.query", ["query", "q_proj"]),
        (["q_proj", "mlp"], ["mlp", "LlamaMLP", "nn.Linear"]),
    ],
)
def test_a_target_that_matches_nothing_is_named_with_its_neighbours(
    targets: list[str] | str, said: list[str]
) -> None:
    base = tiny_llama()
    names = set(base.state_dict())
    with pytest.raises(ValueError, match="target_modules") as error:
        get_peft_model(base, ours(target_modules=targets))
    assert all(word in str(error.value) for word in said)
    assert set(base.state_dict()) == names  # refused before anything was changed


def test_a_refused_second_adapter_leaves_the_first_as_it_was() -> None:
    model = get_peft_model(tiny_llama(), ours()).eval()
    randomise(model)
    want = logits(model)
    with pytest.raises(ValueError, match="nearest"):
        model.add_adapter("second", ours(target_modules=["q_proj", "nope"]))
    assert torch.equal(logits(model), want)
    assert list(model.peft_config) == ["default"]


def test_a_name_that_is_only_excluded_is_said_to_be() -> None:
    with pytest.raises(ValueError, match="exclude_modules"):
        get_peft_model(
            tiny_llama(), ours(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"])
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"num_heads": 0},
        {"num_heads": 1.5},
        {"r": 0},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"lora_dropout": -0.1},
        {"router_temperature": 0.0},
        {"router_temperature": float("nan")},
        {"target_modules": []},
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        ours(**settings)


def test_the_method_is_registered_once_and_other_methods_are_untouched() -> None:
    from crab.adapter.register import add_peft_type, register

    member = add_peft_type("INTERACTION_LORA")
    register(InteractionLoraConfig, type(get_peft_model(tiny_llama(), ours()).base_model))
    assert peft.PeftType("INTERACTION_LORA") is member is peft.PeftType.INTERACTION_LORA
    assert list(peft.PeftType).count(member) == 1
    assert peft.PeftType("LORA") is peft.PeftType.LORA
