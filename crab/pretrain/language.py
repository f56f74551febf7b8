"""The LLM learns the tasks' language from symbols, a whole network from random weights.

Three small losses stand beside the text's. The hidden state that predicts a mask token must name the classes of its
mask: the mask decoder will look for them there. Halfway up, each slot must know what it named a second before:
beginnings and ends are read off that. And there, some heads must look where the next token is written (pointing.py).
Drills (drills.py) stand among the tasks' samples because most of their tokens are evidence.

Legend: R rows, L tokens, G mask tokens, C classes, W width of the LLM.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from crab.model.collate import IGNORED, Batch, Collator, Example
from crab.model.config import AdapterConfig, LlmConfig, tiny
from crab.model.crab_model import CrabModel
from crab.model.tokens import DRAWN_TOKENS, add_new_tokens
from crab.pretrain.drills import drills
from crab.pretrain.fit import OnStep, fit, split_matrices
from crab.pretrain.packing import pack
from crab.pretrain.pointing import Pointers, pointers, pointing_loss
from crab.pretrain.symbols import (
    AUDIO_SLOTS,
    LIKE_ITS_WORD,
    PLACE,
    TIME_STD,
    VIDEO_SLOTS,
    WORDS,
    SymbolReader,
    audio_symbols,
    video_symbols,
)
from crab.samples import Sample
from crab.synth.make import Dice
from crab.synth.questions import samples_of
from crab.synth.scene import CLASS_NAMES, Scene
from crab.tasks.mask_answer import parse_mask_answer
from crab.tasks.spans import NUM_SECONDS

QUESTIONS = 9
"""Questions of the task AVQA that are made of a scene: one of each type that it allows."""

TASK_WEIGHTS = {"avqa": 3.0}
"""How often a task is drawn, beside 1 for the others."""

SAMPLES, DRILLS, DRILLS_ALONE = 2, 2, 5
"""Of a scene in a step: samples of the tasks and drills beside them, or drills alone."""


INNER_STD = 0.07
"""About one over the root of the width: rows keep the size of what they read."""

PLACES, ALONE = 0.02, 0.25
"""Up to this share of the steps the LLM sees drills about places alone, and drills alone."""

RECALL, POINTING = 0.1, 0.2
"""Weights of the two losses that guide attention."""


def symbol_model(
    llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int, *, draws: bool = False
) -> tuple[CrabModel, Collator]:
    """A Crab that reads symbols, every weight of the LLM trained, and its collator. `draws`: it has a mask decoder."""
    video = len(WORDS) + PLACE, VIDEO_SLOTS
    audio = len(WORDS), AUDIO_SLOTS
    base = tiny(llm_path="made here", video_layer="symbols", audio_layer="symbols")
    config = base.model_copy(
        update={
            "llm": LlmConfig(architecture={"model_type": "llama"}),
            "adapter": AdapterConfig(method="none"),
            "masks": base.masks if draws else None,
            "video": base.video.model_copy(
                update={"feature_size": video[0], "num_queries": video[1]}
            ),
            "audio": base.audio.model_copy(
                update={"feature_size": audio[0], "num_queries": audio[1]}
            ),
        }
    )
    # Crab's tokens are added when a Crab is built, not in the preset.
    tokenizer = copy.deepcopy(tokenizer)
    table = add_new_tokens(tokenizer)
    model = CrabModel(llm, config, table)
    llm.requires_grad_(True)
    assert model.time_embedding is not None
    digits = tokenizer([str(second) for second in range(NUM_SECONDS)], add_special_tokens=False)
    first = torch.tensor([ids[0] for ids in digits["input_ids"]])
    with torch.no_grad():
        model.time_embedding.weight.mul_(TIME_STD)
        model.time_embedding.weight[:NUM_SECONDS] += LIKE_ITS_WORD * llm.get_input_embeddings()(
            first
        )
    model.video_projector = SymbolReader(llm, tokenizer, VIDEO_SLOTS, PLACE, seed)  # type: ignore[assignment]  # same call
    model.audio_projector = SymbolReader(llm, tokenizer, AUDIO_SLOTS, 0, seed)  # type: ignore[assignment]
    return model, Collator(config, tokenizer, table)


def symbolic_examples(scene: Scene, samples: Sequence[Sample]) -> list[Example]:
    features = {
        "video": {"symbols": video_symbols(scene)},
        "audio": {"symbols": audio_symbols(scene)},
    }
    return [Example(sample=sample, features=features) for sample in samples]


def train_llm(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[Scene],
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep,
    learning_rate: float = 2e-3,
) -> CrabModel:
    """Trains the whole LLM to answer the samples of the scenes from symbols; `batch` scenes a step."""
    model, collate = symbol_model(llm, tokenizer, seed)
    model.train()
    prepare(llm, seed)
    width = llm.config.hidden_size
    names = nn.Linear(width, len(CLASS_NAMES))
    before = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(WORDS)))
    dice = Dice(seed, 3)

    pieces = [str(collate.tokenizer.decode([token])) for token in range(len(collate.tokenizer))]

    def batches() -> Iterator[tuple[Batch, list[Sample], Pointers]]:
        for step in itertools.count():
            rows: list[tuple[Scene, list[Sample]]] = []
            for scene in dice.sample(pool, batch):
                if step < ALONE * steps:
                    samples = drills(scene, dice, DRILLS_ALONE, first=step < PLACES * steps)
                else:
                    samples = drawn(samples_of(scene, QUESTIONS), dice, SAMPLES)
                    samples += drills(scene, dice, DRILLS)
                rows.append((scene, samples))
            packed = pack(collate, [symbolic_examples(*row) for row in rows])
            yield (
                packed,
                [s for _, samples in rows for s in samples],
                pointers(packed, rows, pieces),
            )

    def loss(inputs: tuple[Batch, list[Sample], Pointers]) -> tuple[Tensor, dict[str, float]]:
        packed, samples, told = inputs
        with torch.autocast("cpu", torch.bfloat16):
            answers = Answers.of(model, packed)
            named = names(answers.at_mask_tokens(model.drawn_ids)).float()
            slots = slots_of(model, packed)
            recalled = [before(answers.halfway[where]).float() for where in slots]
            pointing = pointing_loss(llm, answers.halfway, packed, slots[0] | slots[1], told)
        by_task = answers.loss_by_task([sample.task for sample in samples])
        value = answers.loss.mean()
        if len(named):
            value = value + 0.1 * F.binary_cross_entropy_with_logits(
                named, classes_of_masks(samples)
            )
        streams = (packed["video"], packed["audio"])
        recalls = [recall_loss(*pair) for pair in zip(recalled, streams, strict=True)]
        recall = torch.stack(recalls).sum()
        value = value + RECALL * recall + POINTING * pointing
        return value, by_task | {"recall": recall.item(), "pointing": pointing.item()}

    matrices, others = split_matrices(model)
    fit(
        {2e-3: [*others, *names.parameters(), *before.parameters()]},
        batches(),
        loss,
        steps=steps,
        on_step=on_step,
        matrices={learning_rate: matrices},
    )
    return model


@torch.no_grad()
def prepare(llm: LlamaForCausalLM, seed: int) -> None:
    """First values with which a small LLM learns to look things up in hundreds of steps instead of thousands.

    What layers add to the residual stream begins at zero (or the embeddings drown in random MLP outputs), and half of
    the heads begin as comparers: key matrix = query matrix, so that like attends to like (mimetic initialisation,
    arXiv 2305.09828). "Where is the red circle?" was learnt in 200 steps, without it in none of 600.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in llm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            mlp.gate_proj,
            mlp.up_proj,
        ):
            linear.weight.normal_(0, INNER_STD, generator=generator)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.zero_()
        half = attention.q_proj.weight.shape[0] // 2
        attention.k_proj.weight[:half] = attention.q_proj.weight[:half]


def drawn(samples: Sequence[Sample], dice: Dice, count: int) -> list[Sample]:
    """`count` different samples; a task is as likely as its weight, however many samples it has in this scene."""
    rest = list(samples)
    chosen: list[Sample] = []
    while rest and len(chosen) < count:
        sizes = [sum(other.task == sample.task for other in rest) for sample in rest]
        shares = [TASK_WEIGHTS.get(s.task, 1.0) / n for s, n in zip(rest, sizes, strict=True)]
        mark = dice.between(0, sum(shares))
        at = 0
        while at < len(rest) - 1 and mark >= shares[at]:
            mark -= shares[at]
            at += 1
        chosen.append(rest.pop(at))
    return chosen


def classes_of_masks(samples: Sequence[Sample]) -> Tensor:
    """[G, C] 0 or 1: the classes of the mask that each mask token stands for."""
    rows = []
    for sample in samples:
        for item in parse_mask_answer(sample.answer) or ():
            rows += [[float(name in item.names) for name in CLASS_NAMES]] * len(DRAWN_TOKENS)
    return torch.tensor(rows).reshape(-1, len(CLASS_NAMES))


def slots_of(model: CrabModel, packed: Batch) -> tuple[Tensor, Tensor]:
    """Where the video's and the audio's slots stand, bool [R, L] each."""
    ids = packed["input_ids"]
    return torch.isin(ids, model.video_ids), torch.isin(ids, model.audio_ids)


def recall_loss(found: Tensor, symbols: Tensor) -> Tensor:
    """How well slots tell what they named a second before (in the first second: nothing at all).

    Args:
        found: [R * T * S, words], logits. symbols: [R * T, S, ...], what the slots say.
    """
    named = symbols[..., : len(WORDS)].unflatten(0, (-1, NUM_SECONDS)).float()
    before = F.pad(named[:, :-1], (0, 0, 0, 0, 1, 0))
    off = F.binary_cross_entropy_with_logits(found, before.flatten(0, 2), reduction="none")
    return off.sum(-1).mean()


@dataclass(frozen=True)
class Answers:
    """What the model made of the supervised tokens of a packed batch, in the order of rows and tokens."""

    hidden: Tensor
    """[tokens, W]: the state that predicts each."""
    labels: Tensor
    loss: Tensor
    """[tokens] nats."""
    sample: Tensor
    """[tokens] number of its sample."""
    halfway: Tensor
    """[R, L, W]: the states of all tokens after half of the layers."""

    @classmethod
    def of(cls, model: CrabModel, packed: Batch) -> "Answers":
        output = model.decoder(
            inputs_embeds=model.embed(packed),
            attention_mask=packed["attention_mask"],
            position_ids=packed["position_ids"],
            use_cache=False,
            output_hidden_states=True,
        )
        states = output.last_hidden_state
        supervised = packed["labels"][:, 1:] != IGNORED
        hidden, labels = states[:, :-1][supervised], packed["labels"][:, 1:][supervised]
        loss = F.cross_entropy(model.logits(hidden).float(), labels, reduction="none")
        halfway = output.hidden_states[len(output.hidden_states) // 2]
        return cls(hidden, labels, loss, packed["sample"][:, 1:][supervised], halfway)

    def at_mask_tokens(self, drawn_ids: Tensor) -> Tensor:
        """[G, W]: the states that predict <mask_0> ... <mask_5> of each group."""
        return self.hidden[torch.isin(self.labels, drawn_ids)]

    def loss_by_task(self, tasks: Sequence[str]) -> dict[str, float]:
        kinds = sorted(set(tasks))
        kind = torch.tensor([kinds.index(task) for task in tasks])[self.sample]
        return {
            f"loss/{name}": float(self.loss.detach()[kind == number].mean())
            for number, name in enumerate(kinds)
        }
