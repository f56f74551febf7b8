"""The PEFT contract of the adapter, on a tiny Llama; where PEFT's own LoRA has the same contract
it runs beside ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import (
    LLAMA_LINEARS,
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


def plain_lora(**settings: object) -> PeftConfig:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": list(LLAMA_LINEARS), **settings}
    return LoraConfig(**settings)  # type: ignore[arg-type]


METHODS = pytest.mark.parametrize("make_config", [ours, plain_lora])
Make = Callable[..., PeftConfig]


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


@METHODS
def test_training_moves_the_adapter_and_only_it(make_config: Make) -> None:
    model = get_peft_model(tiny_llama(), make_config()).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert losses[-1] < losses[0]


LOAD_IN_A_NEW_PROCESS = """
import sys, torch
import crab.adapter
from peft import PeftModel
from transformers import LlamaForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
"""


def test_saved_adapter_gives_the_same_logits_in_a_new_process(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        base, ours(num_heads=5, r=4, lora_alpha=6, router_temperature=0.5)
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(IDS, tmp_path / "ids.pt")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    args = [tmp_path / "base", tmp_path / "adapter", tmp_path / "ids.pt", tmp_path / "out.pt"]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_NEW_PROCESS, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(model))


@METHODS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(make_config: Make, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), make_config()).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())  # loaded for inference
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path), is_trainable=True)
    trained = [n for n, p in again.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]


@METHODS
def test_several_adapters_live_side_by_side(make_config: Make, tmp_path: Path) -> None:
    base_logits = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), make_config()).eval()
    model.add_adapter("second", make_config(r=4, target_modules=["q_proj", "down_proj"]))
    randomise(model, "default", seed=1)
    randomise(model, "second", seed=2)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    assert all(".second." in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    assert torch.equal(logits(model), first)

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    loaded.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)

    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name in model.state_dict())
    assert list(model.peft_config) == ["default"]


@METHODS
def test_two_active_adapters_add_up(make_config: Make) -> None:
    class OneLinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    model = get_peft_model(OneLinear(), make_config(target_modules=["lin"])).eval()
    model.add_adapter("second", make_config(target_modules=["lin"]))
    randomise(model, "default", seed=1)
    randomise(model, "second", seed=2)
    x = torch.randn(5, 8)
    deltas = []
    for name in ("default", "second"):
        model.set_adapter(name)
        deltas.append(model(x) - OneLinear()(x))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(model(x) - OneLinear()(x), deltas[0] + deltas[1])
    if make_config is ours:
        with pytest.raises(ValueError, match="second"), record_routing(model):
            pass
        with record_routing(model, "second") as record:
            model(x)
        assert [len(v) for v in record.values()] == [1]


@METHODS
def test_unload_gives_the_base_model_back(make_config: Make) -> None:
    base_logits = logits(tiny_llama())
    names = set(tiny_llama().state_dict())
    model = get_peft_model(tiny_llama(), make_config())
    randomise(model)
    plain = model.unload()
    assert torch.equal(logits(plain), base_logits)
    assert set(plain.state_dict()) == names


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


def test_modules_to_save_travel_with_the_adapter(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), ours(modules_to_save=["lm_head"])).eval()
    randomise(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model))


@METHODS
def test_adapters_may_be_called_a_and_b(make_config: Make, tmp_path: Path) -> None:
    """PEFT leaves out what ends in another adapter's name: a parameter called B would go."""
    model = get_peft_model(tiny_llama(), make_config(), adapter_name="A").eval()
    model.add_adapter("B", make_config())
    randomise(model, "A")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "A")).eval()
    assert torch.equal(logits(loaded), logits(model))
