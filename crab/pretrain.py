"""Make the tiny preset: encoders that name shapes and timbres, and a small LLM that reads evidence.

The encoders learn from scenes that are rendered in memory: the visual one to name the class of every patch, the audio
one to name the timbres of every second. The LLM learns the tasks' language from *symbols*: in place of projected
features it gets, for every frame and every segment, the mean word embedding of each class that is there. A projector
that later turns real features into such vectors makes the frozen LLM answer, which is what adapter training on a
laptop has to do in minutes.

Legend: N scenes or frames, C classes, P patches, S slots (vectors of a frame or segment), W width of the LLM.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from crab.encoders.beats import Beats
from crab.encoders.clip import VisionFeatures
from crab.model.collate import Collator, Example
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig, tiny
from crab.model.crab_model import CrabModel
from crab.model.tokens import add_new_tokens
from crab.samples import Sample
from crab.synth.evidence import targets, transcript
from crab.synth.make import Dice, make_scene
from crab.synth.questions import samples_of
from crab.synth.render import render_frame, shape_mask
from crab.synth.scene import CLASS_NAMES, COLUMNS, Scene, on
from crab.synth.sound import render_mono
from crab.train import batch_indices, cosine_lr

SCENE_SEED = 900_000
"""Scenes for pretraining have seeds from here on; `crab synth` refuses none, but nobody counts this far by hand."""

NUM_SLOTS = 4
"""As many objects as a scene can have, and as many queries as the tiny projector has."""

SAMPLE_RATE_HZ = 16_000

OnStep = Callable[[int, dict[str, float]], None]


def scenes(seed: int, count: int) -> list[Scene]:
    """`count` scenes that no data set of `crab synth` with a small seed contains."""
    return [make_scene(SCENE_SEED + seed, index) for index in range(count)]


def train_vision(
    model: VisionFeatures,
    pool: Sequence[Scene],
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Trains the last selected layer to say, for every patch, which class covers it (or none)."""
    size, layer = int(model.config.image_size), f"layer_{model.layers[-1]}"
    head = nn.Linear(model.config.hidden_size, len(CLASS_NAMES) + 1)
    dice = Dice(seed, 1)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            picks = [(dice.pick(pool), float(dice.below(10))) for _ in range(batch)]
            frames = np.stack([render_frame(scene, t, size) for scene, t in picks])
            labels = np.stack(
                [_patch_classes(scene, t, size, model.config.patch_size) for scene, t in picks]
            )
            yield torch.from_numpy(frames), torch.from_numpy(labels)

    def loss(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        frames_NHWC, labels_NP = inputs
        logits_NPC = head(model(frames_NHWC)[layer])
        named = labels_NP > 0
        right = (logits_NPC.argmax(-1) == labels_NP)[named].float().mean().item()
        # Most patches show background; without the weight the first hundred steps learn nothing else.
        weight = torch.ones(len(CLASS_NAMES) + 1)
        weight[0] = 0.1
        return F.cross_entropy(logits_NPC.flatten(0, 1), labels_NP.flatten(), weight=weight), {
            "right_patches": right
        }

    _fit([*model.parameters(), *head.parameters()], batches(), loss, steps, 1e-3, on_step)


def train_audio(
    model: Beats, pool: Sequence[Scene], *, steps: int, batch: int, seed: int, on_step: OnStep
) -> None:
    """Trains the mean token of a one-second segment to say which timbres sound in it."""
    head = nn.Linear(model.config.encoder_embed_dim, len(CLASS_NAMES))
    dice = Dice(seed, 2)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            picks = [dice.pick(pool) for _ in range(max(1, batch // 10))]
            waves = np.concatenate(
                [render_mono(scene, SAMPLE_RATE_HZ).reshape(-1, SAMPLE_RATE_HZ) for scene in picks]
            )
            heard = np.concatenate([targets(scene)[1] for scene in picks])
            # Loudness must not matter: codecs and microphones change it.
            gains = np.array([[dice.between(0.5, 2.0)] for _ in waves], dtype=np.float32)
            yield (
                torch.from_numpy((waves * gains).astype(np.float32)),
                torch.from_numpy(heard).float(),
            )

    def loss(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        waves_NT, heard_NC = inputs
        logits_NC = head(model(waves_NT).mean(1))
        exact = ((logits_NC > 0) == heard_NC.bool()).all(1).float().mean().item()
        return F.binary_cross_entropy_with_logits(logits_NC, heard_NC), {"exact_seconds": exact}

    _fit([*model.parameters(), *head.parameters()], batches(), loss, steps, 1e-3, on_step)


def train_llm(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    pool: Sequence[Scene],
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Trains the whole LLM to answer the samples of the scenes from symbols."""
    samples = [(scene, sample) for scene in pool for sample in samples_of(scene)]
    config = symbol_config()
    tokenizer = copy.deepcopy(
        tokenizer
    )  # Crab's tokens are added when a Crab is built, not in the preset
    table = add_new_tokens(tokenizer)
    model = CrabModel(llm, config, table)
    model.requires_grad_(False)
    llm.requires_grad_(True)
    model.video_projector = _Symbols(llm, tokenizer, video_symbols(), seed)  # type: ignore[assignment]  # same call
    model.audio_projector = _Symbols(llm, tokenizer, audio_symbols(), seed)  # type: ignore[assignment]
    model.train()
    collate = Collator(config, tokenizer, table)
    dice = Dice(seed, 3)

    def batches() -> Iterator[dict[str, Tensor]]:
        for draw in itertools.count():
            # Eight batches at a time, cut by length: a fifth less padding.
            chosen = batch_indices(seed, draw, 8 * batch, len(samples))
            chosen.sort(key=lambda index: _length(samples[index][1]))
            parts = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
            for part in dice.sample(parts, len(parts)):
                yield collate([_symbolic_example(*samples[index], dice) for index in part])

    def loss(inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs)["loss"], {}

    _fit(list(llm.parameters()), batches(), loss, steps, 2e-3, on_step)


def _length(sample: Sample) -> int:
    return len(sample.instruction) + len(sample.reasoning) + len(sample.answer)


def symbol_config() -> CrabConfig:
    """The tiny model's sizes, reading one-hot symbols instead of features."""
    config = tiny(llm_path="made here", video_layer="symbols", audio_layer="symbols")
    return config.model_copy(
        update={
            "llm": LlmConfig(architecture={"model_type": "llama"}),
            "adapter": AdapterConfig(method="none"),
            "video": config.video.model_copy(
                update={"feature_size": len(video_symbols()), "num_queries": NUM_SLOTS}
            ),
            "audio": config.audio.model_copy(
                update={"feature_size": len(audio_symbols()), "num_queries": NUM_SLOTS}
            ),
        }
    )


def video_symbols() -> list[str]:
    """What a slot of a frame can say: nothing, or a class in a column."""
    return [" nothing", *(f" {name} {column}" for name in CLASS_NAMES for column in COLUMNS)]


def audio_symbols() -> list[str]:
    """What a slot of a segment can say: nothing, or a class."""
    return [" nothing", *(f" {name}" for name in CLASS_NAMES)]


class _Symbols(nn.Module):
    """Stands where a projector stands: one-hot slots [M, S, symbols] -> mean word embeddings [M, S, W] + noise."""

    noise = 0.3
    """Of the embeddings' own size: real projectors will never hit the vectors exactly."""

    def __init__(
        self,
        llm: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        symbols: list[str],
        seed: int,
    ) -> None:
        super().__init__()
        self.num_queries, self.feature_size = NUM_SLOTS, len(symbols)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in symbols]
        longest = max(map(len, ids))
        self._ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        self._share = torch.tensor(
            [[1 / len(r)] * len(r) + [0.0] * (longest - len(r)) for r in ids]
        )
        self._embedding = [llm.get_input_embeddings()]  # in a list: not a submodule a second time
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, slots: Tensor, mask: Tensor | None = None) -> Tensor:
        words = self._embedding[0](self._ids)
        vectors = slots.float() @ (words * self._share.unsqueeze(-1)).sum(1)
        size = vectors.detach().pow(2).mean().sqrt()
        return vectors + self.noise * size * torch.randn(vectors.shape, generator=self._generator)


def _symbolic_example(scene: Scene, sample: Sample, dice: Dice) -> Example:
    seconds = transcript(scene)["seconds"]
    seen = [
        [1 + _video_symbol(item["name"], item["position"]) for item in s["visible"]]
        for s in seconds
    ]
    heard = [[1 + CLASS_NAMES.index(name) for name in s["sounding"]] for s in seconds]
    features = {
        "video": {"symbols": _one_hot(seen, len(video_symbols()), dice)},
        "audio": {"symbols": _one_hot(heard, len(audio_symbols()), dice)},
    }
    return Example(sample=sample, features=features)


def _video_symbol(name: str, column: str) -> int:
    return CLASS_NAMES.index(name) * len(COLUMNS) + COLUMNS.index(column)


def _one_hot(present: list[list[int]], num_symbols: int, dice: Dice) -> np.ndarray:
    """[seconds, S, symbols]; which slot says what is drawn anew each second, as queries promise no order."""
    slots = np.zeros((len(present), NUM_SLOTS, num_symbols), dtype=np.float32)
    for second, symbols in enumerate(present):
        full = (symbols + [0] * NUM_SLOTS)[:NUM_SLOTS]
        for slot, symbol in enumerate(dice.sample(full, NUM_SLOTS)):
            slots[second, slot, symbol] = 1
    return slots


def _patch_classes(scene: Scene, t_s: float, size: int, patch: int) -> np.ndarray:
    """[P] class number from 1 of the shape that covers a fifth of the patch or more; 0 for background."""
    side = size // patch
    labels = np.zeros((side, side), dtype=np.int64)
    best = np.full((side, side), 0.2)
    for actor in scene.actors:
        if not on(actor.visible, int(t_s)):
            continue
        mask = shape_mask(scene, actor, t_s, size)
        cover = mask.reshape(side, patch, side, patch).mean((1, 3))
        labels[cover >= best] = 1 + CLASS_NAMES.index(actor.name)
        best = np.maximum(best, cover)
    return labels.reshape(-1)


def _fit(
    parameters: Sequence[nn.Parameter],
    batches: Iterator,
    loss: Callable,
    steps: int,
    learning_rate: float,
    on_step: OnStep,
) -> None:
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, num_steps=steps, peak=learning_rate, warmup=0.05)
        value, metrics = loss(batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        on_step(step + 1, {"loss": value.item()} | metrics)
