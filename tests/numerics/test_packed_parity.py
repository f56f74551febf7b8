"""Samples packed into one row give what they give on padded rows: losses, mask losses, every gradient.

Measured worst relative difference, to the largest value of a tensor: 1.4e-15 in float64, 4.1e-6 in float32.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_crab
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from crab.model.collate import Batch, Collator, Example
from crab.model.crab_model import CrabModel
from crab.model.generate import generate
from crab.model.packed import packed_hidden_states

OUTPUTS = ("loss", "sample_loss", "sample_tokens", "sample_mask_loss", "sample_mask_frames")


def wakened(**changes: object) -> tuple[CrabModel, Collator]:
    """A model whose adapter does something (B starts at zero), with embeddings of times."""
    model, _, collate = tiny_crab.model(time_positions=8, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            if not parameter.any() and parameter.ndim == 2:
                parameter.normal_(0, 0.05, generator=generator)
        assert model.time_embedding is not None
        model.time_embedding.weight.normal_(0, 0.5, generator=generator)
    return model, collate


def all_kinds(folder: Path) -> list[Example]:
    """Every kind of sample: video, audio, image, all of them, with masks and without, of unequal lengths."""
    return [
        tiny_crab.example(0, num_frames=3),
        tiny_crab.mask_example(folder, 1),
        tiny_crab.example(2, streams="v", num_frames=5),
        tiny_crab.example(3, streams="a", num_segments=1),
        tiny_crab.mask_example(folder, 4, task="avss"),
        tiny_crab.example(5, streams="via", num_frames=1, audio_tokens=9),
        tiny_crab.example(7, streams="i"),
    ]


def computed(model: CrabModel, batch: Batch) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    model.zero_grad()
    output = model(batch, 50.0, 7.0)
    output["loss"].backward()
    grads = {name: p.grad for name, p in model.trainable_parameters().items()}
    return {name: output[name].detach() for name in OUTPUTS} | {
        f"gradient of {name}": grad.clone() for name, grad in grads.items() if grad is not None
    }


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference, relative to the largest value of its tensor, and where it is.

    A gradient below a thousandth of the largest one is measured by that: some are 0 but for rounding (biases of keys).
    """
    assert found.keys() == expected.keys()
    gradients = [float(t.abs().max()) for name, t in expected.items() if name not in OUTPUTS]
    differences = []
    for name, want in expected.items():
        assert found[name].shape == want.shape, name
        scale = float(want.abs().max())
        if name not in OUTPUTS:
            scale = max(scale, 1e-3 * max(gradients))
        differences.append((float((found[name] - want).abs().max()) / (scale or 1), name))
    return max(differences)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("method", ["interaction_lora", "lora"])
def test_packed_samples_learn_what_padded_ones_do(
    tmp_path: Path, method: str, dtype: str, tolerance: float
) -> None:
    model, collate = wakened(method=method)
    model.to(getattr(torch, dtype))
    examples = all_kinds(tmp_path)
    padded, packed = collate(examples), collate(examples, pack=True)
    assert packed["input_ids"].numel() == int(padded["attention_mask"].sum())
    expected = computed(model, padded)
    assert len(expected) == len(OUTPUTS) + len(model.trainable_parameters())
    assert int((expected["sample_mask_frames"] > 0).sum()) == 2
    worst, where = worst_difference(computed(model, packed), expected)
    print(f"{method}, {dtype}: worst {worst:.1e}, {where}")
    assert worst <= tolerance, where


def test_the_order_of_packed_samples_changes_nothing_but_their_order(tmp_path: Path) -> None:
    model, collate = wakened()
    model.double()
    examples = all_kinds(tmp_path)
    forward = computed(model, collate(examples, pack=True))
    backward = computed(model, collate(examples[::-1], pack=True))
    for name in OUTPUTS[1:]:
        backward[name] = backward[name].flip(0)
    assert worst_difference(backward, forward)[0] <= 1e-12


def test_one_sample_and_gradient_checkpointing(tmp_path: Path) -> None:
    """The forward that a checkpoint repeats in the backward keeps samples apart too."""
    model, collate = wakened()
    model.double()
    for examples in (all_kinds(tmp_path)[:1], all_kinds(tmp_path)):
        expected = computed(model, collate(examples))
        model.base.activation_checkpointing_enable({"use_reentrant": False})
        assert worst_difference(computed(model, collate(examples, pack=True)), expected)[0] <= 1e-12
        model.base.activation_checkpointing_disable()


class SeesThoseBefore(CrabModel):
    """Planted bug: causal over the whole row. What transformers does of a mask of ones."""

    def hidden_states(self, embeds: Tensor, batch: Batch, **cache: object) -> Tensor:
        ones = torch.ones_like(batch["input_ids"])
        return super().hidden_states(
            embeds, {"attention_mask": ones, "position_ids": batch["position_ids"]}, **cache
        )


class CountsTimesInTheRow(CrabModel):
    """Planted bug: the second sample's first frame is the frame after the first sample's last."""

    def embed(self, batch: Batch) -> Tensor:
        length = batch["input_ids"].new_tensor([batch["input_ids"].shape[1]])
        return super().embed(batch | {"lengths": length})


@pytest.mark.parametrize("planted", [SeesThoseBefore, CountsTimesInTheRow])
def test_samples_that_see_each_other_would_be_found(
    tmp_path: Path, planted: type[CrabModel]
) -> None:
    model, collate = wakened()
    model.double()
    examples = [*all_kinds(tmp_path)[2:4], tiny_crab.example(8, streams="v")]
    expected = computed(model, collate(examples))
    model.__class__ = planted
    worst, where = worst_difference(computed(model, collate(examples, pack=True)), expected)
    print(f"{planted.__name__}: {worst:.1e}, {where}")
    assert worst > 1e-3


def test_padded_batches_and_generation_are_as_before_packing() -> None:
    """The attention function stays in the model; what is not packed goes through transformers' own."""
    model, collate = wakened()
    examples = [tiny_crab.example(0), tiny_crab.example(1, streams="v", num_frames=4)]
    prompts = collate(examples, with_target=False)
    settings = {"max_new_tokens": 6, "eos_id": collate.eos_id, "return_logits": True}
    before, text = computed(model, collate(examples)), generate(model, prompts, **settings)
    computed(model, collate(examples, pack=True))
    after, again = computed(model, collate(examples)), generate(model, prompts, **settings)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert text.ids == again.ids
    assert torch.equal(text.logits, again.logits)
    with pytest.raises(ValueError, match="padded, not packed"):
        collate(examples, with_target=False, pack=True)


SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def row(*lengths: int, width: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [1, L, W] of random samples, positions and lengths."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, sum(lengths), width, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return embeds, positions, torch.tensor(lengths)


def decoder_of(llm: PreTrainedModel) -> torch.nn.Module:
    return getattr(llm, llm.base_model_prefix)


@pytest.mark.parametrize(
    "make",
    [
        tiny_crab.plain_llm,
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300)),
        lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS)),
        lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=16)),
    ],
    ids=["llama", "gpt2", "qwen2", "mistral"],
)
def test_families_of_models_keep_samples_apart(make: object) -> None:
    torch.manual_seed(0)
    llm = make().double().eval()
    embeds, positions, lengths = row(5, 16, 1, 9)
    decoder = decoder_of(llm)
    alone = [
        decoder(inputs_embeds=part, use_cache=False).last_hidden_state
        for part in embeds.split(lengths.tolist(), dim=1)
    ]
    packed = packed_hidden_states(llm, decoder, embeds, positions, lengths)
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-11, atol=1e-12)


def next_to_nothing() -> LlamaForCausalLM:
    """A Llama whose second layer attends in a way of its own."""
    llm = tiny_crab.plain_llm()
    attention = llm.model.layers[1].self_attn
    attention.config = type(llm.config)(**llm.config.to_dict())
    attention.config._attn_implementation = "sdpa"
    return llm


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(hidden_size=48, n_layer=2, n_head=4)),
            "attends by 'eager'",
        ),
        (
            lambda: Qwen3NextForCausalLM(
                Qwen3NextConfig(**SIZES, **HEADS, layer_types=["linear_attention"] * 2)
            ),
            "layers of linear_attention",
        ),
        (
            lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=15)),
            "a window of 15",
        ),
        (next_to_nothing, "1 of 2 layers kept packed samples apart"),
    ],
    ids=["bloom", "linear attention", "window", "a layer of its own"],
)
def test_a_model_that_cannot_keep_samples_apart_is_refused(make: object, says: str) -> None:
    torch.manual_seed(0)
    llm = make().double()
    with pytest.raises(ValueError, match=says) as error:
        packed_hidden_states(llm, decoder_of(llm), *row(5, 16))
    assert "optimisation.batches: padded" in str(error.value)


def test_lengths_that_do_not_fit_the_row_are_refused() -> None:
    embeds, positions, lengths = row(5, 6)
    llm = tiny_crab.plain_llm().double()
    with pytest.raises(ValueError, match="10 positions in rows of"):
        packed_hidden_states(llm, llm.model, embeds, positions, lengths - torch.tensor([0, 1]))


def test_transformers_keeps_samples_apart_only_without_mask_and_cache() -> None:
    """Why packed.py does not leave it to transformers: two of its three ways are silently wrong."""
    llm = tiny_crab.plain_llm().double()
    embeds, positions, lengths = row(5, 16, 9)
    right = packed_hidden_states(llm, llm.model, embeds, positions, lengths)
    llm.set_attn_implementation("sdpa")
    ones = torch.ones(1, 30, dtype=torch.int64)
    ways = {
        "no mask, no cache": {"attention_mask": None, "use_cache": False},
        "its own default": {"attention_mask": None},
        "a mask of ones": {"attention_mask": ones, "use_cache": False},
    }
    inputs = {"inputs_embeds": embeds, "position_ids": positions}
    apart = {
        name: float((llm.model(**inputs, **way).last_hidden_state - right).detach().abs().max())
        for name, way in ways.items()
    }
    print(apart)
    assert apart["no mask, no cache"] < 1e-12
    assert apart["its own default"] > 0.1
    assert apart["a mask of ones"] > 0.1


def test_a_bfloat16_llm_packs_too(tmp_path: Path) -> None:
    """As on a GPU: rounding is all that differs."""
    model, collate = wakened()
    model.to(torch.bfloat16)
    examples = all_kinds(tmp_path)[:3]
    padded, packed = model(collate(examples)), model(collate(examples, pack=True))
    torch.testing.assert_close(packed["sample_loss"], padded["sample_loss"], rtol=0.02, atol=0)
