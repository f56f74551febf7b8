"""Samples and cached features -> one batch of tensors.

`<video>` stands in the prompt once and becomes frames x queries copies of its id here, so that the
model can put all features of a batch in place with one masked_scatter. Sequences are padded on the
left, as generation needs, or packed into one row. Nothing is ever cut: a sample that is too long is refused by name,
because a cut answer would train the model to stop early.

Legend: N samples, L longest sequence, Mv frames and Ma segments of the whole batch, P encoder
tokens, D feature width, F frames to be drawn, S side of the drawn masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from crab.model.drawing import drawing, frames_to_draw, join_drawings
from crab.model.example import Batch, Example, checked_layer
from crab.model.prompt import prompt_text, target_text, user_text
from crab.model.sequences import IGNORED, packed, padded
from crab.tasks import TASKS
from crab.tasks.mask_answer import NUM_MASK_TOKENS

if TYPE_CHECKING:
    from crab.model.config import CrabConfig
    from crab.model.tokens import TokenTable
    from crab.samples import Sample

__all__ = ["IGNORED", "Batch", "Collator", "Example"]


class Collator:
    """Callable: examples -> batch. Holds what does not change between batches."""

    def __init__(
        self, config: CrabConfig, tokenizer: PreTrainedTokenizerBase, table: TokenTable
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no eos token; set tokenizer.eos_token, answers must end"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.table = table
        self.eos_id = int(tokenizer.eos_token_id)
        self.pad_id = int(self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def __call__(
        self, examples: Sequence[Example], *, with_target: bool = True, pack: bool = False
    ) -> Batch:
        """Batch of int64 input_ids, attention_mask, position_ids (and labels, -100 outside the
        target), each [N, L]; video [Mv, P, D] and audio [Ma, P, D] where some sample has them, with
        video_mask / audio_mask [M, P] (bool) where samples differ in P (MUSIC-AVQA's 2 s segments
        beside 1 s ones). With a target, where the model draws and some sample has a labelled frame in a
        span: mask_coarse and mask_fine [F, P, D], mask_group [F] (counts the groups of mask tokens in
        the labels, row by row), mask_sample [F], mask_target uint8 [F, S, S] (0 and 1, or classes),
        mask_semantic [F] (bool: its target holds classes).

        With `pack` all samples stand in one row without padding: [1, L] each, `lengths` [N] in place of attention_mask
        (sequences.py). To be learnt from, not to be continued.

        Raises:
            ValueError: no examples, a sample too long, features missing or of the wrong shape;
                names the sample.
        """
        if not examples:
            raise ValueError("a batch needs at least one example, got none")
        if pack and not with_target:
            raise ValueError("prompts to be continued are padded, not packed: leave out pack")
        rows, starts = [], []
        frames: list[np.ndarray] = []
        segments: list[np.ndarray] = []
        drawings: list[Batch] = []
        num_groups = 0
        for index, example in enumerate(examples):
            media = self._media(example)
            prompt = self._prompt_ids(example.sample, media)
            target = self._target_ids(example.sample) if with_target else []
            length = len(prompt) + len(target)
            if length > self.config.prompt.max_length:
                raise ValueError(
                    f"sample {example.sample.id!r} needs {length} tokens (prompt {len(prompt)}, "
                    f"target {len(target)}), prompt.max_length is "
                    f"{self.config.prompt.max_length}; raise it or shorten the sample"
                )
            rows.append(prompt + target)
            starts.append(len(prompt))
            frames += [media[name] for name in ("video", "image") if name in media]
            segments += [media["audio"]] if "audio" in media else []
            if with_target:
                found = drawing(example, self.config, index, num_groups)
                drawings += [] if found is None else [found]
                num_groups += target.count(self.table.drawn_ids[0])
        if pack:
            batch = packed(rows, starts)
        else:
            batch = padded(rows, starts if with_target else None, self.pad_id)
        batch |= _stack("video", frames)
        batch |= _stack("audio", segments)
        if drawings:
            batch |= join_drawings(drawings)
        return batch

    def num_target_tokens(self, sample: Sample) -> int:
        """Supervised tokens of a sample, end token included: what a rank needs to know of the
        others' samples to normalise its loss.
        """
        return len(self._target_ids(sample))

    def num_mask_frames(self, sample: Sample) -> int:
        """Frames of a sample that carry mask loss, without opening a file: the unit of the mask loss."""
        return len(frames_to_draw(sample, self.config))

    def layers(self, sample: Sample) -> dict[str, tuple[str, ...]]:
        """Stream -> the encoder outputs that the model reads of this sample; those for drawing only where it draws."""
        task = TASKS.get(sample.task)
        draws = task is not None and task.needs in ("mask", "classes")
        return {
            stream: self.config.layers(stream, masks=draws)
            for stream in ("video", "image", "audio")
        }

    def _media(self, example: Example) -> dict[str, np.ndarray]:
        sample, found = example.sample, {}
        for name, projector in (
            ("video", self.config.video),
            ("image", self.config.video),
            ("audio", self.config.audio),
        ):
            if name in example.features:
                setting = "audio.layer" if name == "audio" else "video.layer"
                found[name] = checked_layer(
                    example, name, projector.layer, projector.feature_size, setting
                )
            elif getattr(sample, name) is not None:
                raise ValueError(
                    f"sample {sample.id!r} names {name} {getattr(sample, name)!r} but no {name} "
                    "features were given; "
                    "preprocess it, or leave the sample out"
                )
        return found

    def _prompt_ids(self, sample: Sample, media: dict[str, np.ndarray]) -> list[int]:
        text = prompt_text(user_text(sample, media), self.tokenizer, self.config.prompt)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for name, array in media.items():
            placeholder = self.table.id_of[f"<{name}>"]
            if ids.count(placeholder) != 1:
                raise ValueError(
                    f"sample {sample.id!r}: the prompt has {ids.count(placeholder)} tokens "
                    f"<{name}>, expected 1; "
                    "was the tokenizer given Crab's tokens (add_new_tokens)?"
                )
            projector = self.config.audio if name == "audio" else self.config.video
            at = ids.index(placeholder)
            ids[at : at + 1] = [placeholder] * (array.shape[0] * projector.num_queries)
        return ids

    def _target_ids(self, sample: Sample) -> list[int]:
        text = target_text(sample, self.config.prompt)
        if not text:
            raise ValueError(f"sample {sample.id!r} has an empty answer; training needs a target")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        media_ids = {*self.table.video_ids, *self.table.audio_ids}
        if media_ids.intersection(ids):
            raise ValueError(
                f"sample {sample.id!r}: reasoning or answer contains a media token; remove it"
            )
        group = [*self.table.drawn_ids]
        if [token for token in ids if token in group] != group * ids.count(group[0]):
            raise ValueError(
                f"sample {sample.id!r}: the answer's mask tokens do not come in whole groups of "
                f"{NUM_MASK_TOKENS}, <mask_0> first"
            )
        return [*ids, self.eos_id]


def _stack(name: str, arrays: list[np.ndarray]) -> Batch:
    """Concatenate along the frames; where P differs, pad with zeros and say so in a mask."""
    if not arrays:
        return {}
    widths = {array.shape[1] for array in arrays}
    if len(widths) == 1:
        return {name: torch.from_numpy(np.concatenate(arrays))}
    longest = max(widths)
    padded = [np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0))) for array in arrays]
    real = [np.broadcast_to(np.arange(longest) < a.shape[1], (a.shape[0], longest)) for a in arrays]
    return {
        name: torch.from_numpy(np.concatenate(padded)),
        f"{name}_mask": torch.from_numpy(np.concatenate(real)),
    }
