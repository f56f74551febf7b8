"""What PEFT promises of an adapter, as one table of cases; each runs over our method and over PEFT's own LoRA.

LoRA beside ours says whether a case states PEFT's contract, or what we wish it were. What only ours does (its targets,
its kernel, what it records) is in tests/unit/test_adapter*.py and test_adapter_kernel.py.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import LLAMA_LINEARS, InteractionLoraConfig

IDS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7], [1, 4, 1, 42, 13], [6, 2, 3, 60, 5]])
TOLERANCE = 2e-5
"""Of logits up to 10 in float32; measured 4.5e-6: a part of a batch is multiplied in other blocks."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to adapt a model, as a user chooses it."""

    name: str
    config: Callable[..., PeftConfig]
    merges: bool

    def adapted(self, **settings: Any) -> PeftModel:
        """A tiny Llama with one adapter, named default, filled as training would; in evaluation mode."""
        model = get_peft_model(tiny_llama(), self.config(**settings)).eval()
        fill(model, "default")
        return model

    def two_adapters(self) -> PeftModel:
        """As `adapted`, and with another on other targets, of another rank; default is active."""
        model = self.adapted()
        model.add_adapter("second", self.config(r=2, target_modules=["q_proj", "down_proj"]))
        fill(model, "second", seed=2)
        return model.eval()


def interaction_lora(**settings: Any) -> PeftConfig:
    return InteractionLoraConfig(**{"lora_dropout": 0.1, "router_temperature": 0.5} | settings)


def one_head(**settings: Any) -> PeftConfig:
    return InteractionLoraConfig(**{"num_heads": 1} | settings)


def plain_lora(**settings: Any) -> PeftConfig:
    common = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": list(LLAMA_LINEARS)}
    return LoraConfig(**common | settings)


METHODS = [
    Method(name="interaction_lora", config=interaction_lora, merges=False),
    Method(name="one_head", config=one_head, merges=False),
    Method(name="lora", config=plain_lora, merges=True),
]


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
        initializer_range=0.2,  # wide enough that no two rows say the same
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def fill(model: nn.Module, adapter: str, seed: int = 1) -> None:
    """Random weights: a new adapter does nothing, which hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **arguments: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **arguments).logits
    return found


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


Contract = Callable[[Method, Path], None]
CONTRACTS: list[Contract] = []


def contract(case: Contract) -> Contract:
    """Puts a case into the table."""
    CONTRACTS.append(case)
    return case


# Save and load


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


@contract
def loads_in_a_new_process(method: Method, folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "base")
    model = method.adapted(r=4, lora_alpha=6)
    model.save_pretrained(str(folder / "adapter"))
    torch.save(IDS, folder / "ids.pt")
    places = [folder / name for name in ("base", "adapter", "ids.pt", "out.pt")]
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", LOAD_IN_A_NEW_PROCESS, *map(str, places)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(folder / "out.pt"), logits(model))


@contract
def saves_the_adapter_and_nothing_else(method: Method, folder: Path) -> None:
    model = method.adapted()
    model.save_pretrained(str(folder))
    assert {path.name for path in folder.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    saved = load_file(folder / "adapter_model.safetensors")
    assert not any("default" in name for name in saved)  # a name is chosen when it is loaded
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for tensor in saved.values()) == numel


@contract
def names_inside_other_names_are_told_apart(method: Method, folder: Path) -> None:
    model = method.adapted()
    want, number = logits(model), len(get_peft_model_state_dict(model))
    others = ("default2", "my_default", "foodefault_bar", "efaul")
    for name in others:
        model.add_adapter(name, method.config())
        fill(model, name, seed=3)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert len(load_file(folder / "adapter_model.safetensors")) == number
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(folder))), want)
    for name in others:
        model.delete_adapter(name)
    assert torch.equal(logits(model), want)


@contract
def adapters_are_loaded_beside_each_other(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder), adapter_name="one").eval()
    result = loaded.load_adapter(str(folder / "second"), "two")
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(logits(loaded), first)  # to load is not to choose
    loaded.set_adapter("two")
    assert torch.equal(logits(loaded), second)
    assert trained(loaded) == {name for name in trained(loaded) if ".two." in name} != set()
    loaded.load_adapter(str(folder), "three", is_trainable=False)
    loaded.set_adapter("three", inference_mode=True)
    assert torch.equal(logits(loaded), first)
    assert trained(loaded) == set()


@contract
def a_loaded_adapter_is_for_inference_unless_it_is_to_be_trained(
    method: Method, folder: Path
) -> None:
    model = method.adapted()
    model.save_pretrained(str(folder))
    for low_cpu_mem_usage in (False, True):  # True: made on the meta device, then given its weights
        how = {"low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(tiny_llama(), str(folder), **how).eval()
        assert torch.equal(logits(loaded), logits(model))
        assert trained(loaded) == set()
        again = PeftModel.from_pretrained(tiny_llama(), str(folder), is_trainable=True, **how)
        assert trained(again) == trained(model)


@contract
def adapters_may_be_called_a_and_b(method: Method, folder: Path) -> None:
    """PEFT leaves out what ends in another adapter's name: a parameter called B would go."""
    model = get_peft_model(tiny_llama(), method.config(), adapter_name="A").eval()
    model.add_adapter("B", method.config())
    fill(model, "A")
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder / "A")).eval()
    assert torch.equal(logits(loaded), logits(model))


@contract
def loading_over_an_adapter_replaces_it(method: Method, folder: Path) -> None:
    model = method.adapted()
    want = logits(model)
    model.save_pretrained(str(folder))
    fill(model, "default", seed=9)
    assert not torch.equal(logits(model), want)
    model.load_adapter(str(folder), "default")
    assert torch.equal(logits(model), want)


@contract
def a_config_given_at_loading_is_taken(method: Method, folder: Path) -> None:
    model = method.adapted()
    model.save_pretrained(str(folder))
    config = method.config(lora_alpha=32)
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder), config=config).eval()
    assert loaded.peft_config["default"] is config
    assert config.inference_mode
    assert not torch.allclose(logits(loaded), logits(model))


@contract
def weights_that_do_not_fit_are_refused(method: Method, folder: Path) -> None:
    method.adapted(r=4).save_pretrained(str(folder))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_llama(), str(folder), config=method.config(r=8))


@contract
def the_state_of_an_adapter_moves_between_models(method: Method, folder: Path) -> None:
    model = method.adapted()
    state = get_peft_model_state_dict(model)
    other = get_peft_model(tiny_llama(), method.config(), adapter_name="other").eval()
    set_peft_model_state_dict(other, state, adapter_name="other")
    assert torch.equal(logits(other), logits(model))
    whole = get_peft_model(tiny_llama(), method.config()).eval()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(logits(whole), logits(model))


@contract
def modules_to_save_are_each_adapters_own(method: Method, folder: Path) -> None:
    model = method.adapted(modules_to_save=["lm_head"])
    model.add_adapter("second", method.config(modules_to_save=["lm_head"]))
    fill(model.eval(), "second", seed=2)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(first, second)
    assert any("lm_head" in name for name in trained(model))
    model.save_pretrained(str(folder))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()
    loaded.load_adapter(str(folder / "second"), "second")
    loaded.eval()
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), second)


@contract
def copies_and_pickles_are_the_same_model(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fill(model, "default", seed=8)  # a twin has weights of its own
        assert torch.equal(logits(twin), want)
        twin.set_adapter("second")
        assert not torch.equal(logits(twin), want)


# Several adapters


@contract
def choosing_an_adapter_decides_what_runs_and_what_trains(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    first = logits(model)
    assert trained(model) == {n for n in trained(model) if ".default." in n} != set()
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    assert trained(model) == {n for n in trained(model) if ".second." in n} != set()
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(model), first)
    assert trained(model) == set()
    model.set_requires_grad("second")
    assert trained(model) == {n for n in trained(model) if ".second." in n} != set()
    with pytest.raises(ValueError, match="third"):
        model.set_adapter("third")
    assert torch.equal(logits(model), first)


@contract
def two_active_adapters_add_up(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    base, deltas = layer.base_layer(x), []
    for name in ("default", "second"):
        model.set_adapter(name)
        deltas.append(layer(x) - base)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x) - base, deltas[0] + deltas[1], rtol=0, atol=TOLERANCE)


@contract
def the_status_says_what_is_active(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    status = model.get_model_status()
    assert status.available_adapters == ["default", "second"]
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.enabled is True
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == len(model.get_layer_status()) == 14
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@contract
def adapters_go_into_a_model_without_a_wrapper(method: Method, folder: Path) -> None:
    base = tiny_llama()
    want = logits(base)
    inject_adapter_in_model(method.config(), base, "default")
    assert torch.equal(logits(base), want)
    fill(base, "default")
    # A new adapter of LoRA drops out until it is told not to; ours is in the mode of its layer.
    assert torch.equal(logits(base.eval()), logits(method.adapted()))


# Without the adapter


@contract
def disabling_gives_the_bits_of_the_base(method: Method, folder: Path) -> None:
    base, model = logits(tiny_llama()), method.two_adapters()
    want, names = logits(model), trained(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        assert trained(model) == set()
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), want)
    assert trained(model) == names
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), want)


@contract
def deleting_leaves_the_others(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    with pytest.raises(ValueError, match="third"):
        model.delete_adapter("third")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")  # the active one: the other takes over
    assert torch.equal(logits(model), first)
    assert list(model.peft_config) == ["default"]
    assert not [name for name, _ in model.named_parameters() if ".second." in name]
    assert trained(model) == {n for n, _ in model.named_parameters() if ".default." in n}
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    # The name is free again, for an adapter that knows nothing of the first of that name.
    model.add_adapter("second", method.config(r=2, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(tiny_llama()))
    fill(model.eval(), "second", seed=2)
    assert torch.equal(logits(model), second)
    model.delete_adapter("default")  # one that is not active
    assert torch.equal(logits(model), second)


@contract
def unloading_gives_the_base_back(method: Method, folder: Path) -> None:
    base = tiny_llama()
    want = logits(base)
    before = {name: parameter for name, parameter in base.named_parameters()}
    model = get_peft_model(base, method.config())
    model.add_adapter("second", method.config(target_modules=["o_proj"]))
    fill(model, "default")
    plain = model.unload()
    assert torch.equal(logits(plain), want)
    after = dict(plain.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)  # nothing was copied
    again = get_peft_model(plain, method.config()).eval()
    fill(again, "default")
    assert torch.equal(logits(again), logits(method.adapted()))


@contract
def merging_is_exact_or_refused(method: Method, folder: Path) -> None:
    model = method.adapted()
    want = logits(model)
    if method.merges:
        model.merge_adapter()
        torch.testing.assert_close(logits(model), want, rtol=0, atol=TOLERANCE)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), want, rtol=0, atol=TOLERANCE)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), want, rtol=0, atol=TOLERANCE)
        return
    for merge in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(NotImplementedError, match=r"depends on the token.*unload\(\)"):
            getattr(model, merge)()
        assert torch.equal(logits(model), want)
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    assert model.get_model_status().merged_adapters == []


# Batches whose samples have adapters of their own


@contract
def every_sample_gets_its_own_adapter(method: Method, folder: Path) -> None:
    model = method.adapted(modules_to_save=["lm_head"])
    model.add_adapter(
        "second",
        method.config(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
    )
    fill(model, "second", seed=2)
    model.eval()
    alone: dict[str, Tensor] = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    assert (
        min((a - b).abs().max() for a in alone.values() for b in alone.values() if a is not b) > 0.1
    )
    for active in ("default", "second"):
        model.set_adapter(active)
        for names in (
            ["second", "default", "__base__", "second"],
            ["__base__"] * 4,
            ["second"] * 4,
            ["default", "default", "second", "default"],
        ):
            got = logits(model, adapter_names=names)
            want = torch.stack([alone[name][row] for row, name in enumerate(names)])
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
        assert torch.equal(logits(model), alone[active])  # and the model is what it was


@contract
def mixed_batches_generate(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    names = ["second", "__base__", "default", "second"]

    def generate(**arguments: Any) -> Tensor:
        """[samples, answers of each, tokens]"""
        fixed = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
        torch.manual_seed(3)
        found: Tensor = model.generate(input_ids=IDS, **fixed, **arguments)
        return found.unflatten(0, (len(IDS), -1))

    ways: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ]
    if method.name != "lora":  # which repeats the names for beams alone
        ways.append({"do_sample": True, "num_return_sequences": 2})
    for way in ways:
        alone = {}
        for name in ("default", "second"):
            model.set_adapter(name)
            alone[name] = generate(**way)
        with model.disable_adapter():
            alone["__base__"] = generate(**way)
        got = generate(adapter_names=names, **way)
        assert torch.equal(got, torch.stack([alone[n][row] for row, n in enumerate(names)])), way
        assert all(not torch.equal(got, answers) for answers in alone.values())


@contract
def mixed_batches_that_make_no_sense_are_refused(method: Method, folder: Path) -> None:
    model = method.two_adapters()
    with pytest.raises(ValueError, match="thrid"):
        logits(model, adapter_names=["default", "thrid", "default", "default"])
    with pytest.raises(ValueError, match="training"):
        logits(model.train(), adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match="2 and 4"):
        logits(model.eval(), adapter_names=["default", "second"])
    if (
        method.name != "lora"
    ):  # whose hooks stay after an error, so that the model is of no use any more
        assert torch.equal(logits(model), logits(method.two_adapters()))


# Training


@contract
def only_the_adapter_trains(method: Method, folder: Path) -> None:
    model = get_peft_model(tiny_llama(), method.config()).train()
    model.add_adapter("idle", method.config(r=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = trained(model)
    # All parameters, and decay that would pull at whatever has a gradient.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = model.state_dict()
    # A gate of one head is 1 whatever its router says, but decay moves its row.
    assert {name for name in after if not torch.equal(after[name], before[name])} == names


@contract
def embeddings_may_be_given_and_get_gradients(method: Method, folder: Path) -> None:
    """As Crab does with media."""
    model = method.adapted()
    embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
    got = model(inputs_embeds=embeds).logits
    assert torch.equal(got, logits(model))
    got.square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.isfinite().all()
    assert (embeds.grad.abs().amax(-1) > 0).all()


@contract
def no_nan_from_large_inputs(method: Method, folder: Path) -> None:
    """Up to 1e12 in float32 and bfloat16: the router's gradient has x squared, and 1e38 is their largest number.

    In float16, whose largest is 65504, up to the largest activations of Llama-2-7B (2,600: arXiv 2402.17762).
    """
    for dtype, scales in (
        (torch.float32, (0.0, 1e-30, 1.0, 1e4, 1e12)),
        (torch.bfloat16, (0.0, 1e-30, 1.0, 1e4, 1e12)),
        (torch.float16, (0.0, 1e-7, 1.0, 2.6e3)),
    ):
        for autocast_adapter_dtype in (True, False):
            model = get_peft_model(
                tiny_llama(dtype),
                method.config(target_modules=["layers.0.mlp.down_proj"]),
                autocast_adapter_dtype=autocast_adapter_dtype,
            ).train()
            fill(model, "default")
            layer = model.get_base_model().model.layers[0].mlp.down_proj
            for scale in scales:
                x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)) * scale
                x = x.to(dtype).requires_grad_()
                y = layer(x)
                assert y.dtype == dtype
                assert y.isfinite().all(), (dtype, scale)
                y.float().mean().backward()
                assert x.grad is not None
                assert x.grad.isfinite().all(), (dtype, scale)
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        assert parameter.grad is not None, name
                        assert parameter.grad.isfinite().all(), (name, dtype, scale)
                        parameter.grad = None


@contract
def no_nan_in_a_bf16_model_that_trains(method: Method, folder: Path) -> None:
    model = get_peft_model(tiny_llama(torch.bfloat16), method.config()).train()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e4)  # frozen: as large as outliers of an LLM
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(p.isfinite().all() for p in model.parameters())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("case", CONTRACTS, ids=lambda case: case.__name__)
def test_contract(case: Contract, method: Method, tmp_path: Path) -> None:
    case(method, tmp_path)
