"""Where a token of an answer is written in the symbols, and the loss that makes attention look there.

To write "from 2", the slot of the named object in second 2 must be found among a hundred; that alone takes a small LLM
thousands of steps of text loss, as nothing tells it that it looked at the wrong slot. Here the truth is known, so a few
heads are told.

Legend: R rows, L tokens, S slots of a row (the video's, then the audio's), K tokens with evidence.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaForCausalLM, apply_rotary_pos_emb

from crab.model.collate import IGNORED, Batch
from crab.pretrain.symbols import AUDIO_SLOTS, VIDEO_SLOTS
from crab.samples import Sample
from crab.synth.scene import CLASS_NAMES, COLOURS, NUM_ROWS, Actor, Scene, on
from crab.tasks.spans import NUM_SECONDS

LAYER, HEADS = 2, 3
"""The first so many heads of this layer are told: late enough that the layers before can work out what to look for."""

_NAME = "|".join(CLASS_NAMES)
_SPANS = r"(from \d+ to \d+(?: and from \d+ to \d+)*|never)"


@dataclass(frozen=True)
class Evidence:
    """Characters [start, end) of a target can be read off these slots of the row, any of them."""

    start: int
    end: int
    slots: tuple[int, ...]


def evidence(scene: Scene, instruction: str, target: str) -> Iterator[Evidence]:
    """What the regular phrases of AV-Shapes' targets rest on: times, lists of a second, boxes, places, event lists."""
    actors = {actor.name: actor for actor in scene.actors}
    for times in re.finditer(rf"Times of the ({_NAME}): seen {_SPANS}, heard {_SPANS}", target):
        if (actor := actors.get(times[1])) is not None:
            yield from _spans(times, 2, partial(_seen, actor))
            yield from _spans(times, 3, partial(_heard, actor))
    for kind, slot in (("visual", _seen), ("audio", _heard)):
        for events in re.finditer(rf"<{kind}_event>(.*?)</{kind}_event>", target):
            for event in re.finditer(rf"({_NAME}),((?:\(\d+ \d+\))+)", events[1]):
                yield from _spans(event, 2, partial(slot, actors[event[1]]), events.start(1))
    for listed in re.finditer(r"[Aa]t second (\d+) seen: ([^;.]*)[;.] [hH]eard: ([^.]*)", target):
        second = int(listed[1])
        for group, slot in ((2, _seen), (3, _heard)):
            for name in re.finditer(_NAME, listed[group]):
                at = listed.start(group)
                yield Evidence(at + name.start(), at + name.end(), (slot(actors[name[0]], second),))
    for begins in re.finditer(r"Sounds begin: ([^.]*)", target):
        for begin in re.finditer(rf"({_NAME}) at (\d+)", begins[1]):
            at, heard = begins.start(1), _heard(actors[begin[1]], int(begin[2]))
            yield Evidence(at + begin.start(2), at + begin.end(2), (heard,))
    for box in re.finditer(rf"({_NAME})(?: is at|\.) <obj>(.*?)</obj>", target):
        asked = re.search(r"at second (\d+)", instruction)
        assert asked is not None
        slots = (_seen(actors[box[1]], int(asked[1])),)
        for number in re.finditer(r"\d+", box[2]):
            at = box.start(2)
            yield Evidence(at + number.start(), at + number.end(), slots)
    for place in re.finditer(rf"({_NAME}) moves (?:on|in) the (left|middle|right)", target):
        actor = actors[place[1]]
        shown = tuple(_seen(actor, t) for t in range(scene.duration_s) if on(actor.visible, t))
        yield Evidence(place.start(2), place.end(2), shown)


def _spans(
    found: re.Match[str], group: int, slot: Callable[[int], int], offset: int = 0
) -> Iterator[Evidence]:
    """A begin is read off its own second, an end off the first second without (which knows the one before, by the
    recall loss), or off the clip's last."""
    at = offset + found.start(group)
    for span in re.finditer(r"(\d+)(?: to | )(\d+)", found[group]):
        begin, end = int(span[1]), int(span[2])
        yield Evidence(at + span.start(1), at + span.end(1), (slot(begin),))
        yield Evidence(at + span.start(2), at + span.end(2), (slot(min(end, NUM_SECONDS - 1)),))


def _seen(actor: Actor, second: int) -> int:
    return second * VIDEO_SLOTS + actor.column * NUM_ROWS + actor.row


def _heard(actor: Actor, second: int) -> int:
    return NUM_SECONDS * VIDEO_SLOTS + second * AUDIO_SLOTS + COLOURS.index(actor.colour)


@dataclass(frozen=True)
class Pointers:
    """The tokens of a packed batch that rest on slots."""

    rows: Tensor
    """[K]"""
    positions: Tensor
    """[K]: of the tokens that predict them."""
    slots: Tensor
    """[K, S] bool."""


def pointers(
    packed: Batch, rows: Sequence[tuple[Scene, Sequence[Sample]]], pieces: Sequence[str]
) -> Pointers:
    """Evidence as places in the batch that `pack` made of these samples. `pieces`: the text of each token."""
    found: list[tuple[int, int, tuple[int, ...]]] = []
    number = 0
    for row, (scene, samples) in enumerate(rows):
        for sample in samples:
            mine = (packed["sample"][row] == number) & (packed["labels"][row] != IGNORED)
            number += 1
            places = mine.nonzero()[:, 0].tolist()
            texts = [pieces[token] for token in packed["labels"][row][mine].tolist()]
            starts = list(itertools.accumulate(map(len, texts), initial=0))
            for item in evidence(scene, sample.instruction, "".join(texts)):
                for place, text, start in zip(places, texts, starts, strict=False):
                    if start < item.end and start + len(text) > item.start and text.strip():
                        found.append((row, place - 1, item.slots))
    slots = torch.zeros(len(found), NUM_SECONDS * (VIDEO_SLOTS + AUDIO_SLOTS), dtype=torch.bool)
    for index, (_, _, marked) in enumerate(found):
        slots[index, list(marked)] = True
    return Pointers(
        torch.tensor([row for row, _, _ in found], dtype=torch.long),
        torch.tensor([place for _, place, _ in found], dtype=torch.long),
        slots,
    )


def pointing_loss(
    llm: LlamaForCausalLM, states: Tensor, packed: Batch, slots: Tensor, told: Pointers
) -> Tensor:
    """Mean over tokens and heads of minus the logarithm of the attention that rests on the evidence.

    Args:
        states: [R, L, W], what enters layer LAYER. slots: bool [R, L], where slots stand, S in each row.
    """
    if not len(told.rows):
        return states.new_zeros(())
    layer = llm.model.layers[LAYER]
    attention, size = layer.self_attn, llm.config.hidden_size // llm.config.num_attention_heads
    states = layer.input_layernorm(states)
    query, key = (
        F.linear(states, linear.weight[: HEADS * size]).unflatten(-1, (HEADS, size)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj)
    )
    cos, sin = llm.model.rotary_emb(states, packed["position_ids"])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    scores = query.transpose(1, 2)[told.rows, told.positions].unsqueeze(2) @ key[
        told.rows
    ].transpose(-1, -2)
    scores = scores.squeeze(2).float() / math.sqrt(size)
    allowed = packed["attention_mask"][told.rows, 0, told.positions].unsqueeze(1)
    scores = scores.masked_fill(~allowed, float("-inf"))
    at = slots.nonzero()[:, 1].reshape(len(slots), -1)[told.rows].unsqueeze(1)
    on_slots = scores.gather(-1, at.expand(-1, HEADS, -1))
    right = on_slots.masked_fill(~told.slots.unsqueeze(1), float("-inf")).logsumexp(-1)
    return (scores.logsumexp(-1) - right).mean()
