"""Evidence for a token is where the symbols really say it, and the loss is the attention that rests on it."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from crab.model.llm import tiny_llama, train_tokenizer
from crab.pretrain.drills import drills
from crab.pretrain.fit import scenes
from crab.pretrain.language import Answers, slots_of, symbol_model, symbolic_examples
from crab.pretrain.packing import pack
from crab.pretrain.pointing import LAYER, Evidence, evidence, pointers, pointing_loss
from crab.pretrain.symbols import (
    AUDIO_SLOTS,
    DIGITS,
    VIDEO_SLOTS,
    WORDS,
    audio_symbols,
    video_symbols,
)
from crab.samples import Sample
from crab.synth.make import Dice
from crab.synth.questions import samples_of
from crab.synth.scene import CLASS_NAMES, Scene

SCENES = scenes(4, 12)


def names_of_slots(scene: Scene) -> list[set[str]]:
    """By slot, the video's first: the classes it names."""
    video = video_symbols(scene)[:, :, : len(WORDS)].reshape(-1, len(WORDS))
    audio = audio_symbols(scene).reshape(-1, len(WORDS))
    return [
        {WORDS[word].strip() for word in row.nonzero()[0]} - {"nothing"}
        for row in np.concatenate([video, audio])
    ]


def text_of(sample: Sample) -> str:
    return f"{sample.reasoning} {sample.answer}".strip()


def asked(scene: Scene) -> list[tuple[Sample, str, list[Evidence]]]:
    samples = [*samples_of(scene, 9), *drills(scene, Dice(2), 12)]
    return [(s, text_of(s), list(evidence(scene, s.instruction, text_of(s)))) for s in samples]


@pytest.mark.parametrize("scene", SCENES)
def test_times_rest_on_the_seconds_of_change(scene: Scene) -> None:
    names = names_of_slots(scene)
    for sample, text, found in asked(scene):
        if sample.task != "drill-times":
            continue
        name = next(n for n in CLASS_NAMES if n in sample.instruction)
        assert len(found) == len(re.findall(r"\d+", text))
        for number, item in enumerate(found):
            (slot,) = item.slots
            width = AUDIO_SLOTS if slot >= 10 * VIDEO_SLOTS else VIDEO_SLOTS
            second = slot % (10 * VIDEO_SLOTS) // width
            told = int(text[item.start : item.end])
            if number % 2 == 0:
                assert second == told
                assert name in names[slot]
                assert not second or name not in names[slot - width]
            elif told < 10:
                assert second == told
                assert name not in names[slot]
                assert name in names[slot - width]
            else:
                assert second == 9
                assert name in names[slot]


@pytest.mark.parametrize("scene", SCENES)
def test_boxes_and_names_rest_on_slots_that_say_them(scene: Scene) -> None:
    names, video = names_of_slots(scene), video_symbols(scene).reshape(10 * VIDEO_SLOTS, -1)
    for sample, text, found in asked(scene):
        if sample.task in ("arig", "drill-box"):
            edges = [item for item in found if text[item.start : item.end].isdigit()]
            assert len(edges) == 4
            for edge, item in enumerate(edges):
                start = len(WORDS) + VIDEO_SLOTS + edge * sum(DIGITS)
                parts = np.split(video[item.slots[0]][start:], np.cumsum(DIGITS))[:3]
                digits = [str(part.argmax()) for part in parts]
                assert int("".join(digits)) == int(text[item.start : item.end])
        for item in found:
            if (said := text[item.start : item.end]) in CLASS_NAMES:
                assert all(said in names[slot] for slot in item.slots)


def test_every_task_with_times_or_boxes_has_evidence() -> None:
    told = {s.task for scene in SCENES for s, _, found in asked(scene) if found}
    assert told >= {"ave", "avvp", "arig", "s4", "ms3", "avss", "avqa", "avcap", "drill-place"}


def test_the_loss_is_the_attention_that_misses_the_evidence() -> None:
    rows = [(scene, drills(scene, Dice(5), 3)) for scene in SCENES[:2]]
    texts = [part for _, samples in rows for s in samples for part in (s.instruction, text_of(s))]
    tokenizer = train_tokenizer([*texts, *WORDS], vocab_size=400)
    llm = tiny_llama(len(tokenizer), seed=1)
    model, collate = symbol_model(llm, tokenizer, 0)
    packed = pack(collate, [symbolic_examples(*row) for row in rows])
    pieces = [str(collate.tokenizer.decode([token])) for token in range(len(collate.tokenizer))]
    told = pointers(packed, rows, pieces)
    assert len(told.rows) > 10
    at = packed["labels"][told.rows, told.positions + 1]
    assert all(pieces[token].strip() for token in at.tolist())
    video, audio = slots_of(model, packed)
    with torch.no_grad():
        # Heads that ask nothing attend to all that they may see alike.
        llm.model.layers[LAYER].self_attn.q_proj.weight.zero_()
        states = Answers.of(model, packed).halfway
        loss = pointing_loss(llm, states, packed, video | audio, told)
    visible = packed["attention_mask"][told.rows, 0, told.positions].sum(-1)
    expected = (visible / told.slots.sum(-1)).log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
