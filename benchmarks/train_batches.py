"""Useful tokens a second of forward and backward: our batches, and those that Hugging Face offers.

    python benchmarks/train_batches.py [--samples 24] [--repeats 2]

One thread. Samples as multimodal training has them, 16 to 640 visual and 16 to 96 text tokens, of which the second
half of the text is supervised; a Llama of 6 layers of 384 with 32,000 words, PEFT's LoRA on all linear layers. A step
is all samples, in micro batches of 8. Candidates take turns in every round. *Tokens* are those of the samples, so
padding and unsupervised logits are pure cost; ratios are of CPU seconds within a round.

Hugging Face: DataCollatorForSeq2Seq on samples in random order, and sorted by length; DataCollatorWithFlattening on
packs of at most 1024 tokens (first fit, longest first), with `use_cache=False` and without attention_mask, as otherwise
samples see each other. Its model computes logits of all positions. Ours: the batches of a train job.

All have the same weights. Unless losses and gradients of the first 8 samples agree, in batches of 4, no figure is
printed and the exit code is 1. Our logits leave out tokens that only prompts hold, so the comparison leaves them out
of theirs; the timed steps do not.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from measure import Goals, header, versions
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening
from transformers.trainer_pt_utils import get_length_grouped_indices

from crab.model.build import build_model
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig, tiny
from crab.model.crab_model import CrabModel
from crab.model.llm import train_tokenizer
from crab.model.sequences import packed, padded
from crab.model.tokens import GENERATED_TOKENS
from jobs.partition import parts_of_equal_sum, parts_of_equal_work

MICRO_BATCH, PACK = 8, 1024
COMPARED = 8
VOCABULARY, WIDTH, LAYERS = 32_000, 384, 6
FIRST_WORD = 1_000
"""Below lie the words of the tokenizer and Crab's tokens, which no sample holds."""
TOLERANCE = 1e-5  # of the loss; measured 1e-7
GRADIENT_TOLERANCE = 1e-4  # relative to a tensor's largest value; measured 1.8e-6


@dataclass(frozen=True)
class Sample:
    """Token ids, the last `supervised` of them the answer."""

    ids: list[int]
    supervised: int

    @property
    def start(self) -> int:
        return len(self.ids) - self.supervised

    @property
    def labels(self) -> list[int]:
        return [-100] * self.start + self.ids[self.start :]


def make_samples(count: int) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for _ in range(count):
        visual, text = int(random.integers(16, 641)), int(random.integers(16, 97))
        ids = random.integers(FIRST_WORD, VOCABULARY, visual + text).tolist()
        samples.append(Sample(ids, text // 2))
    return samples


def build() -> tuple[CrabModel, object]:
    """A Crab with LoRA that does something, and its tokenizer."""
    base = tiny()
    architecture = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    config = CrabConfig.model_validate(
        base.model_dump()
        | {
            "llm": LlmConfig(architecture=architecture),
            "adapter": AdapterConfig(method="lora", lora_dropout=0.0),
            "masks": None,
            "time_positions": 0,
        }
    )
    tokenizer = train_tokenizer(["some words"], vocab_size=300)
    tokenizer.padding_side = "right"  # transformers' default
    model = build_model(config, tokenizer)
    head = model.base.get_output_embeddings()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
        ids = [model.table.id_of[name] for name in GENERATED_TOKENS]
        model.new_head.rows.copy_(head.weight[ids])
    return model.train(), tokenizer


@dataclass
class Candidate:
    """The micro batches of a step, and how the loss of one is computed."""

    batches: list[dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], bool], Tensor]
    """(batch, is it compared) -> its share of the loss of all samples."""
    positions: int
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def step(self, *, compared: bool = False) -> float:
        total = 0.0
        for batch in self.batches:
            loss = self.loss(batch, compared)
            loss.backward()
            total += loss.item()
        return total


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Numbers of the samples in each pack, the longest first."""
    packs: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        for place, (length, pack) in enumerate(packs):
            if length + lengths[index] <= limit:
                packs[place] = (length + lengths[index], [*pack, index])
                break
        else:
            packs.append((lengths[index], [index]))
    return [pack for _, pack in packs]


def candidates(
    samples: list[Sample], micro_batch: int, mine: CrabModel, theirs: CrabModel, tokenizer: object
) -> dict[str, Candidate]:
    """The batches of each candidate for these samples."""
    count = len(samples)
    lengths = [len(sample.ids) for sample in samples]
    supervised = sum(sample.supervised for sample in samples)
    hidden_words = theirs.new_head.prompt_only_ids
    llm = theirs.llm

    def hf_loss(batch: dict[str, Tensor], compared: bool) -> Tensor:
        inputs = dict(batch)
        if not compared:
            return llm(**inputs, num_items_in_batch=supervised).loss
        labels = inputs.pop("labels")
        logits = llm(**inputs).logits.index_fill(-1, hidden_words, float("-inf"))
        return theirs.base.loss_function(
            logits, labels, vocab_size=VOCABULARY, num_items_in_batch=supervised
        )

    def our_loss(batch: dict[str, Tensor], compared: bool) -> Tensor:
        return mine(batch, float(supervised))["loss"]

    def hf(groups: Iterable[Sequence[int]], collate: Callable, **more: object) -> Candidate:
        batches = []
        for group in groups:
            rows = [{"input_ids": samples[i].ids, "labels": samples[i].labels} for i in group]
            batches.append(dict(collate(rows)) | more)
        return Candidate(batches, hf_loss, sum(b["input_ids"].numel() for b in batches))

    def ours(groups: Iterable[Sequence[int]], *, pack: bool) -> Candidate:
        batches = []
        for group in groups:
            rows, starts = [samples[i].ids for i in group], [samples[i].start for i in group]
            batches.append(packed(rows, starts) if pack else padded(rows, starts, 0))
        return Candidate(batches, our_loss, sum(b["input_ids"].numel() for b in batches))

    def cut(order: Sequence[int]) -> list[Sequence[int]]:
        return [order[i : i + micro_batch] for i in range(0, count, micro_batch)]

    pad = DataCollatorForSeq2Seq(tokenizer, padding=True)
    # One mega batch of all: with thousands of samples the default groups as well as that, with so few not at all.
    grouped = get_length_grouped_indices(
        lengths, micro_batch, count // micro_batch, torch.Generator().manual_seed(0)
    )
    by_length = sorted(range(count), key=lambda index: lengths[index])
    num_parts = count // micro_batch
    in_order = [lengths[index] for index in by_length]
    return {
        "HF padded": hf(cut(range(count)), pad),
        "HF grouped by length": hf(cut(grouped), pad),
        "HF packed": hf(
            first_fit(lengths, PACK),
            DataCollatorWithFlattening(return_tensors="pt"),
            use_cache=False,
            attention_mask=None,
        ),
        "ours padded": ours(
            [by_length[part] for part in parts_of_equal_work(in_order, [0] * count, num_parts)],
            pack=False,
        ),
        "ours packed": ours(parts_of_equal_sum(lengths, num_parts), pack=True),
    }


def gradients(model: CrabModel) -> dict[str, Tensor]:
    """Of the adapter, taken away."""
    found = {}
    for name, parameter in model.trainable_parameters().items():
        if "lora_" in name:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def disagreement(runs: dict[str, Candidate], models: dict[bool, CrabModel]) -> tuple[float, float]:
    """(loss, gradient): largest relative difference from the first candidate; a step each.

    Args:
        models: ours, and theirs.
    """
    results = {
        name: (run.step(compared=True), gradients(models[name.startswith("ours")]))
        for name, run in runs.items()
    }
    first_loss, first = next(iter(results.values()))
    worst_loss = worst_gradient = 0.0
    for name, (loss, found) in results.items():
        apart = max(float((found[n] - first[n]).abs().max() / first[n].abs().max()) for n in first)
        print(f"{name:22} loss {loss:.6f}, gradients {apart:.1e} apart from the first")
        worst_loss = max(worst_loss, abs(loss - first_loss) / first_loss)
        worst_gradient = max(worst_gradient, apart)
    return worst_loss, worst_gradient


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=24, help="a multiple of 8")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    goals = Goals()
    samples = make_samples(args.samples)
    tokens = sum(len(sample.ids) for sample in samples)
    share = sum(sample.supervised for sample in samples) / tokens
    header(
        f"{len(samples)} samples, {tokens:,} tokens, {share:.1%} supervised; "
        f"Llama, {LAYERS} layers of {WIDTH}, LoRA"
    )
    print(f"{versions('torch', 'peft', 'transformers')}; fp32, one thread, {args.repeats} rounds")
    (mine, tokenizer), (theirs, _) = build(), build()
    models = {True: mine, False: theirs}
    compared = candidates(samples[:COMPARED], COMPARED // 2, mine, theirs, tokenizer)
    loss, gradient = disagreement(compared, models)
    if not (loss <= TOLERANCE and gradient <= GRADIENT_TOLERANCE):
        goals.broken(f"losses differ by {loss:.1e}, gradients by {gradient:.1e}: no times")
        return 1
    runs = candidates(samples, MICRO_BATCH, mine, theirs, tokenizer)
    for _ in range(args.repeats):
        for name, run in runs.items():
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            run.step()
            run.cpu_s.append(time.process_time() - cpu)
            run.wall_s.append(time.perf_counter() - wall)
            models[name.startswith("ours")].zero_grad()

    def ratio(of: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(runs[of].cpu_s, runs[to].cpu_s, strict=True))

    first = next(iter(runs))
    print(
        f"{'':22} {'tokens/s':>9} {'best':>8} {'CPU s':>8} {'wall s':>8} {'padding':>8} {'x first':>8}"
    )
    for name, run in runs.items():
        middle = statistics.median(run.cpu_s)
        print(
            f"{name:22} {tokens / middle:9.0f} {tokens / min(run.cpu_s):8.0f} {middle:8.2f} "
            f"{statistics.median(run.wall_s):8.2f} {1 - tokens / run.positions:8.1%} {ratio(first, name):8.2f}"
        )
    goals.check("ours packed / HF padded", ratio("HF padded", "ours packed"), 2.5)
    goals.check("ours packed / HF packed", ratio("HF packed", "ours packed"), 1.2)
    print(f"ours packed / ours padded: {ratio('ours padded', 'ours packed'):.2f}")
    return int(goals.failed)


if __name__ == "__main__":
    sys.exit(main())
