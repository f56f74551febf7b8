"""The model against slow, obvious references. Tolerances name the measured worst case."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_crab
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from crab.model.collate import Batch, Collator
from crab.model.config import ProjectorConfig
from crab.model.crab_model import CrabModel
from crab.model.generate import generate
from crab.model.projector import Projector
from crab.model.tokens import GENERATED_TOKENS
from crab.train import micro_batches, rank_slice, supervised_tokens

TIGHT = 1e-6  # float32; measured worst 0 (the same operations in another order)


@pytest.fixture
def wakened() -> CrabModel:
    """A model whose adapter does something: B starts at zero, and a no-op would prove little."""
    model, _, _ = tiny_crab.model()
    generator = torch.Generator().manual_seed(3)
    zeros = [p for p in model.trainable_parameters().values() if not p.any() and p.ndim == 2]
    assert len(zeros) == 14  # two layers of seven targets
    with torch.no_grad():
        for parameter in zeros:
            parameter.normal_(0, 0.05, generator=generator)
    return model.eval()


@pytest.fixture
def collator(wakened: CrabModel) -> Collator:
    words = tiny_crab.tokenizer()
    from crab.model.tokens import add_new_tokens

    return Collator(wakened.config, words, add_new_tokens(words))


def spliced_slowly(model: CrabModel, batch: Batch) -> list[Tensor]:
    """One sample and one token at a time, features taken from a queue. [length, width] each."""
    vectors = {
        "video": list(model.video_projector(batch["video"]).flatten(0, 1)),
        "audio": list(model.audio_projector(batch["audio"]).flatten(0, 1)),
    }
    ids = model.table.id_of
    stream_of = {ids["<video>"]: "video", ids["<image>"]: "video", ids["<audio>"]: "audio"}
    table = model.base.get_input_embeddings().weight
    samples = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        parts = []
        for token in row[mask.bool()].tolist():
            if token in stream_of:
                parts.append(vectors[stream_of[token]].pop(0))
            elif token in model.table.ids:
                parts.append(model.new_embedding.rows[model.table.ids.index(token)])
            else:
                parts.append(table[token])
        samples.append(torch.stack(parts))
    assert not vectors["video"]
    assert not vectors["audio"]
    return samples


def full_logits(model: CrabModel, embeds: Tensor) -> Tensor:
    """[1, L, width] -> [L, vocabulary and new tokens], with every matrix written out."""
    hidden = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[0]
    base = hidden @ model.base.get_output_embeddings().weight.T
    full = hidden.new_full((len(hidden), max(*model.table.ids, base.shape[1] - 1) + 1), -torch.inf)
    full[:, : base.shape[1]] = base
    for name, token_id in model.table.id_of.items():
        full[:, token_id] = -torch.inf
        if name in GENERATED_TOKENS:
            full[:, token_id] = hidden @ model.new_head.rows[GENERATED_TOKENS.index(name)]
    return full


def mixed_examples() -> list:
    return [
        tiny_crab.example(0),
        tiny_crab.example(1, streams="v", num_frames=4),
        tiny_crab.example(2, streams="a", num_segments=1),
        tiny_crab.example(3, streams="via", num_frames=1),
    ]


def test_splice_and_loss_equal_the_slow_reference(wakened: CrabModel, collator: Collator) -> None:
    batch = collator(mixed_examples())
    embeds = wakened.embed(batch)
    samples = spliced_slowly(wakened, batch)
    output = wakened(batch)
    for index, expected in enumerate(samples):
        mask = batch["attention_mask"][index].bool()
        torch.testing.assert_close(embeds[index][mask], expected, rtol=0, atol=TIGHT)
        labels = batch["labels"][index][mask]
        logits = full_logits(wakened, expected.unsqueeze(0))
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        tokens = int((labels[1:] != -100).sum())
        assert int(output["sample_tokens"][index]) == tokens
        torch.testing.assert_close(output["sample_loss"][index], loss, rtol=1e-5, atol=0)
    total = output["sample_loss"].sum() / output["sample_tokens"].sum()
    torch.testing.assert_close(output["loss"].detach(), total)


def test_neighbours_and_padding_do_not_matter(wakened: CrabModel, collator: Collator) -> None:
    """In float64, so that only a real dependence can show; measured worst 0."""
    wakened.double()
    examples = mixed_examples()
    together = wakened(collator(examples))["sample_loss"]
    alone = torch.cat([wakened(collator([example]))["sample_loss"] for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=0)


def test_segments_of_unequal_length_share_a_batch(wakened: CrabModel, collator: Collator) -> None:
    wakened.double()
    examples = [tiny_crab.example(0, audio_tokens=6), tiny_crab.example(1, audio_tokens=11)]
    batch = collator(examples)
    assert batch["audio_mask"].sum(1).tolist() == [6, 6, 6, 11, 11, 11]
    alone = torch.cat([wakened(collator([example]))["sample_loss"] for example in examples])
    torch.testing.assert_close(wakened(batch)["sample_loss"], alone, rtol=1e-11, atol=0)


def test_generated_text_does_not_depend_on_neighbours(
    wakened: CrabModel, collator: Collator
) -> None:
    """float32; measured worst difference of a logit 2e-5 at a size of about 9."""
    examples = mixed_examples()
    settings = {"max_new_tokens": 12, "eos_id": collator.eos_id, "return_logits": True}
    together = generate(wakened, collator(examples, with_target=False), **settings)
    for index, example in enumerate(examples):
        alone = generate(wakened, collator([example], with_target=False), **settings)
        assert alone.ids[0] == together.ids[index]
        steps = len(alone.ids[0])
        torch.testing.assert_close(
            alone.logits[0, :steps], together.logits[index, :steps], rtol=0, atol=1e-4
        )


def test_cached_steps_equal_a_full_pass_over_what_was_written(
    wakened: CrabModel, collator: Collator
) -> None:
    """Positions, mask and cache of every step, at a padded sample."""
    batch = collator(mixed_examples(), with_target=False)
    written = generate(wakened, batch, max_new_tokens=8, eos_id=collator.eos_id, return_logits=True)
    for index, prompt in enumerate(spliced_slowly(wakened, batch)):
        answer = wakened.embed({"input_ids": torch.tensor([written.ids[index]])})[0]
        logits = full_logits(wakened, torch.cat([prompt, answer]).unsqueeze(0))
        expected = logits[len(prompt) - 1 : -1]
        torch.testing.assert_close(
            written.logits[index, : len(expected)], expected, rtol=0, atol=1e-4
        )


def test_text_only_equals_transformers_generate() -> None:
    llm = tiny_crab.plain_llm()
    settings = tiny_crab.config("none")
    words = tiny_crab.tokenizer()
    from crab.model.build import build_model

    model = build_model(settings, words, llm=llm)
    prompts = [words(text, add_special_tokens=False)["input_ids"] for text in tiny_crab.texts()[:3]]
    prompts[1] = prompts[1][:5]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    with torch.no_grad():
        # transformers knows nothing of our tokens: kept out here (a logit of 0 never wins) and,
        # where their ids fall on unused rows of its vocabulary, there.
        model.new_head.rows.zero_()
        expected = llm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            suppress_tokens=list(model.table.ids),
        )
    ours = generate(model, batch, max_new_tokens=16, eos_id=2)
    for row, reference in zip(ours.ids, expected[:, longest:].tolist(), strict=True):
        assert row == (reference[: reference.index(2)] if 2 in reference else reference)


def test_two_ranks_give_the_gradient_of_one(wakened: CrabModel, collator: Collator) -> None:
    """The parts' losses, each over the global number of tokens, add up to the whole: float64."""
    wakened.double()
    examples = [tiny_crab.example(i, streams=("va", "v", "a", "va")[i % 4]) for i in range(4)]
    whole = collator(examples)
    names = wakened.trainable_parameters()

    wakened.zero_grad()
    wakened(whole)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in names.items()}

    wakened.zero_grad()
    normalizer = float(supervised_tokens(whole))
    for rank in range(2):
        for part in micro_batches(rank_slice(examples, rank, 2), 1):
            wakened(collator(part), normalizer)["loss"].backward()
    for name, parameter in names.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-14)


def attention(queries: Tensor, keys: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """BERT's attention for one frame, head by head. [Q, H], [P, D] -> [Q, H]."""
    projected = {
        part: F.linear(
            queries if part == "query" else keys,
            weights[f"attention.{part}.weight"],
            weights[f"attention.{part}.bias"],
        )
        for part in ("query", "key", "value")
    }
    size = projected["query"].shape[1] // heads
    outputs = []
    for head in range(heads):
        q, k, v = (
            projected[part][:, head * size : (head + 1) * size]
            for part in ("query", "key", "value")
        )
        outputs.append(torch.softmax(q @ k.T / size**0.5, dim=1) @ v)
    mixed = torch.cat(outputs, dim=1)
    return post_norm(mixed, queries, weights, "output.")


def post_norm(hidden: Tensor, residual: Tensor, weights: dict[str, Tensor], prefix: str) -> Tensor:
    hidden = F.linear(hidden, weights[prefix + "dense.weight"], weights[prefix + "dense.bias"])
    norm = (weights[prefix + "LayerNorm.weight"], weights[prefix + "LayerNorm.bias"])
    return F.layer_norm(hidden + residual, (hidden.shape[1],), *norm, eps=1e-12)


def under(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n[len(prefix) :]: t for n, t in weights.items() if n.startswith(prefix)}


def test_projector_equals_a_bert_style_q_former_written_out() -> None:
    """Self-attention, cross-attention in every layer, feed-forward; measured worst 2e-15."""
    torch.manual_seed(0)
    config = ProjectorConfig(
        layer="x", feature_size=12, num_queries=3, hidden_size=32, num_heads=4, num_layers=2,
        intermediate_size=48, dropout=0.1,
    )  # fmt: skip
    projector = Projector(config, llm_width=20).double().eval()
    for parameter in projector.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    features = torch.randn(2, 7, 12, dtype=torch.float64)
    weights = dict(projector.state_dict())
    for index in range(2):
        keys = F.layer_norm(
            features[index], (12,), weights["input_norm.weight"], weights["input_norm.bias"]
        )
        hidden = F.layer_norm(
            weights["queries"][0],
            (32,),
            weights["qformer.layernorm.weight"],
            weights["qformer.layernorm.bias"],
            eps=1e-12,
        )
        for layer in range(2):
            block = under(weights, f"qformer.encoder.layer.{layer}.")
            hidden = attention(hidden, hidden, under(block, "attention."), 4)
            hidden = attention(hidden, keys, under(block, "crossattention."), 4)
            inner = F.gelu(
                F.linear(
                    hidden,
                    block["intermediate_query.dense.weight"],
                    block["intermediate_query.dense.bias"],
                )
            )
            hidden = post_norm(inner, hidden, block, "output_query.")
        expected = F.linear(
            F.gelu(F.linear(hidden, weights["mlp.0.weight"], weights["mlp.0.bias"])),
            weights["mlp.2.weight"],
            weights["mlp.2.bias"],
        )
        torch.testing.assert_close(projector(features)[index], expected, rtol=1e-9, atol=1e-9)


def test_half_precision_features_are_read_as_they_are(
    wakened: CrabModel, collator: Collator
) -> None:
    """What the cache holds (float16) must not be rounded again on the way to the projector."""
    examples = [tiny_crab.example(0)]
    half = {
        stream: {name: array.astype(np.float16) for name, array in layers.items()}
        for stream, layers in examples[0].features.items()
    }
    widened = {
        stream: {name: array.astype(np.float32) for name, array in layers.items()}
        for stream, layers in half.items()
    }
    sample = examples[0].sample
    losses = [
        wakened(collator([type(examples[0])(sample=sample, features=f)]))["loss"]
        for f in (half, widened)
    ]
    assert torch.equal(*losses)
