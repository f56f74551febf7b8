"""The adapter on a tiny Llama: what is its own. What it shares with PEFT's LoRA is in
tests/numerics/test_peft_contracts.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import (
    InteractionHeads,
    InteractionLoraConfig,
    InteractionLoraLinear,
    record_routing,
)

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_gives_the_same_bits(dtype: torch.dtype) -> None:
    base = tiny_llama(dtype)
    want = logits(base)
    assert torch.equal(logits(get_peft_model(base, ours())), want)


def test_every_llama_linear_gets_two_parameters_and_nothing_else_trains() -> None:
    model = get_peft_model(tiny_llama(), ours(num_heads=3, r=8))
    trainable = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # two parameters, seven linears, two layers
    assert all("ilora_" in name for name in trainable)
    shapes = sorted(shape for n, shape in trainable.items() if "layers.1.mlp.down_proj" in n)
    assert shapes == [(8 + 3, 48), (32, 3 * 8)]


def test_of_two_active_adapters_one_is_named_to_be_recorded() -> None:
    model = get_peft_model(tiny_llama(), ours()).eval()
    model.add_adapter("second", ours(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="second"), record_routing(model):
        pass
    with record_routing(model, "second") as record:
        logits(model)
    assert [len(gates) for gates in record.values()] == [1, 1]
    names = ["second", "default"]
    with record_routing(model, "second") as record:
        model(IDS, adapter_names=names)
    assert [gates.shape[0] for (gates,) in record.values()] == [1, 1]  # its own samples alone


@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_is_refused_and_harms_nothing(merge: str) -> None:
    # A module saved whole comes before the first target, and PEFT unwraps it on its way there.
    model = get_peft_model(tiny_llama(), ours(modules_to_save=["embed_tokens"])).eval()
    randomise(model)
    want = logits(model)
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(NotImplementedError, match="depends on the token"):
        getattr(model, merge)()
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), want)


def test_adapter_is_fp32_on_a_bf16_base_and_only_the_active_one_trains() -> None:
    model = get_peft_model(tiny_llama(torch.bfloat16), ours())
    model.add_adapter("second", ours(r=2))
    dtypes = {p.dtype for n, p in model.named_parameters() if "ilora_" in n}
    assert dtypes == {torch.float32}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".second." in n)
    assert logits(model).dtype == torch.bfloat16
    same = get_peft_model(tiny_llama(torch.bfloat16), ours(), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in same.named_parameters() if "ilora_" in n} == {torch.bfloat16}


def test_recording_names_modules_follows_forwards_and_ends() -> None:
    model = get_peft_model(tiny_llama(), ours(num_heads=3)).eval()
    want = logits(model)
    with record_routing(model) as record, record_routing(model) as inner:
        assert torch.equal(model(IDS).logits, want)
        logits(model)
    logits(model)
    assert len(record) == 14
    assert all(isinstance(model.get_submodule(name), InteractionLoraLinear) for name in record)
    for name, gates in record.items():
        assert [g.shape for g in gates] == [(2, 5, 3)] * 2
        assert not gates[0].requires_grad
        assert gates[0].dtype == torch.float32
        assert torch.equal(inner[name][1], gates[1])


def test_recording_a_model_without_the_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="InteractionLoraConfig"), record_routing(tiny_llama()):
        pass
    model = get_peft_model(tiny_llama(), ours())
    with pytest.raises(ValueError, match="ghost"), record_routing(model, "ghost"):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = get_peft_model(tiny_llama(), ours(lora_dropout=0.3)).train()
        randomise(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 28
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad)


def test_autocast_trains_a_whole_model() -> None:
    model = get_peft_model(tiny_llama(), ours()).train()
    randomise(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in grads)


def test_generation_with_a_cache_equals_generation_without() -> None:
    """A router that looked at other tokens would decide otherwise for one new token than for the
    whole prefix.
    """
    model = get_peft_model(tiny_llama(), ours()).eval()
    randomise(model)
    runs = [
        model.generate(
            input_ids=IDS[:1], max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0
        )
        for cache in (True, False)
    ]
    assert torch.equal(*runs)


def test_sharded_weights_are_not_saved(tmp_path: Path) -> None:
    """Under ZeRO-3 an ungathered parameter has no elements; PEFT would write it, and loading it
    fails much later.
    """
    model = get_peft_model(tiny_llama(), ours())
    heads = next(m for m in model.modules() if isinstance(m, InteractionHeads))
    heads.weight_ar.data = torch.empty(0)
    with pytest.raises(ValueError, match="GatheredParameters"):
        model.save_pretrained(str(tmp_path))
