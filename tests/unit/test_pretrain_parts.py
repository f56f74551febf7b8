"""Parts of pretraining whose mistakes no loss would show: symbols, packing, drills, the split of parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from crab.model.llm import tiny_llama, train_tokenizer
from crab.pretrain.drills import drills
from crab.pretrain.fit import fit, scenes, split_matrices
from crab.pretrain.language import (
    Answers,
    classes_of_masks,
    drawn,
    recall_loss,
    symbol_model,
    symbolic_examples,
)
from crab.pretrain.packing import pack
from crab.pretrain.symbols import DIGITS, VIDEO_SLOTS, WORDS, audio_symbols, video_symbols
from crab.pretrain.vision import CELLS, box_of, patches
from crab.synth.boxes import tight_box
from crab.synth.evidence import transcript
from crab.synth.index_maps import index_map
from crab.synth.make import Dice
from crab.synth.questions import samples_of
from crab.synth.render import shape_mask
from crab.synth.scene import CLASS_NAMES, COLOURS, NUM_ROWS, on

SCENES = scenes(3, 6)


def test_a_packed_sample_has_the_loss_that_it_has_alone() -> None:
    texts = [part for s in samples_of(SCENES[0]) for part in (s.instruction, s.answer, s.reasoning)]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    llm = tiny_llama(len(tokenizer), seed=1)
    model, collate = symbol_model(llm, tokenizer, 0)
    model.eval()
    rows = [
        symbolic_examples(SCENES[0], samples_of(SCENES[0])[:3]),
        symbolic_examples(SCENES[1], samples_of(SCENES[1])[:2]),
    ]
    with torch.no_grad():
        answers = Answers.of(model, pack(collate, rows))
        alone = model(collate([example for row in rows for example in row]))
    together = torch.zeros(5).index_add(0, answers.sample, answers.loss)
    assert torch.allclose(together, alone["sample_loss"], rtol=1e-4)
    by_task = answers.loss_by_task([e.sample.task for row in rows for e in row])
    assert set(by_task) == {f"loss/{e.sample.task}" for row in rows for e in row}


@pytest.mark.parametrize("scene", SCENES)
def test_symbols_say_what_the_transcript_says(scene) -> None:  # type: ignore[no-untyped-def]
    video, audio = video_symbols(scene), audio_symbols(scene)
    for second, truth in enumerate(transcript(scene)["seconds"]):
        seen = {WORDS[slot.argmax()].strip() for slot in video[second, :, : len(WORDS)]}
        assert seen - {"nothing"} == {item["name"] for item in truth["visible"]}
        heard = {
            (WORDS[word].strip(), slot)
            for slot, word in zip(*np.nonzero(audio[second]), strict=True)
            if word
        }
        assert heard == {(name, COLOURS.index(name.split()[0])) for name in truth["sounding"]}
        # A slot with nothing says so, and one with something does not.
        assert (audio[second, :, 0] == (audio[second, :, 1:].sum(1) == 0)).all()
    for actor in scene.seen:
        second = next(s for s in range(10) if on(actor.visible, s))
        slot = video[second, actor.column * NUM_ROWS + actor.row]
        edges = np.split(slot[len(WORDS) + VIDEO_SLOTS :], 4)
        for edge, pixel in zip(edges, tight_box(scene, actor, second), strict=True):
            digits = np.split(edge, np.cumsum(DIGITS)[:-1])
            assert all(digit.sum() == 1 for digit in digits)
            assert (
                sum(10**place * d.argmax() for place, d in zip((2, 1, 0), digits, strict=True))
                == pixel
            )


def test_patches_agree_with_the_masks() -> None:
    scene = SCENES[0]
    second = next(s for s in range(10) if any(on(a.visible, s) for a in scene.actors))
    truth = patches([(scene, float(second))], 14)
    whole = index_map(scene, second) > 0
    cover = truth.cover[0].reshape(14, 14, CELLS, CELLS).permute(0, 2, 1, 3).reshape(56, 56)
    assert np.allclose(cover, whole.reshape(56, 4, 56, 4).mean((1, 3)), atol=1e-6)
    named = {int(c) for c in truth.classes[0] if c > 0}
    shown = [a for a in scene.actors if on(a.visible, second)]
    assert named == {1 + CLASS_NAMES.index(a.name) for a in shown}
    for actor in shown:
        at = (truth.classes[0] == 1 + CLASS_NAMES.index(actor.name)).nonzero()[:, 0]
        box = box_of(shape_mask(scene, actor, float(second), 224))
        assert torch.allclose(truth.boxes[0, at] * 224, torch.tensor(box).float())


def test_drills_are_true() -> None:
    scene = SCENES[2]
    truth = transcript(scene)["seconds"]
    asked = drills(scene, Dice(1), 60)
    seconds = [d for d in asked if d.instruction.startswith("What is there")]
    boxes = [d for d in asked if d.instruction.startswith("Box")]
    assert seconds
    assert boxes
    for drill in seconds:
        second = int(drill.instruction.split()[-1].rstrip("?"))
        seen = ", ".join(item["name"] for item in truth[second]["visible"]) or "nothing"
        heard = ", ".join(truth[second]["sounding"]) or "nothing"
        assert drill.answer == f"At second {second} seen: {seen}; heard: {heard}."
    for drill in boxes:
        name, second = drill.instruction.removeprefix("Box of the ").split(" at second ")
        actor = next(a for a in scene.actors if a.name == name)
        x1, y1, x2, y2 = tight_box(scene, actor, int(second.rstrip("?")))
        assert drill.answer == f"The {name} is at <obj>({x1},{y1})({x2},{y2})</obj>"


def test_tasks_are_drawn_by_weight_not_by_number_of_samples() -> None:
    samples = next(s for s in map(samples_of, SCENES) if sum(x.task == "ref-avs" for x in s) == 2)
    dice = Dice(5)
    first = [drawn(samples, dice, 1)[0].task for _ in range(3000)]
    tasks = {sample.task for sample in samples}
    share = 1 / (len(tasks) - 1 + 3)  # AVQA has weight 3
    assert first.count("ref-avs") / 3000 == pytest.approx(share, abs=0.03)
    assert first.count("avqa") / 3000 == pytest.approx(3 * share, abs=0.04)


def test_classes_of_masks_repeat_for_each_token_of_a_group() -> None:
    sample = next(s for s in samples_of(SCENES[0]) if s.task == "ref-avs")
    group = "<mask_start>" + "".join(f"<mask_{i}>" for i in range(6)) + "<mask_end>"
    answer = f"<range> 0,2 </range> green circle {group} ; <range> 4,5 </range> red circle, blue square {group}"
    rows = classes_of_masks([sample.model_copy(update={"answer": answer})])
    assert rows.shape == (12, len(CLASS_NAMES))
    assert [CLASS_NAMES[i] for i in rows[0].nonzero()[:, 0]] == ["green circle"]
    assert [CLASS_NAMES[i] for i in rows[11].nonzero()[:, 0]] == ["red circle", "blue square"]


def test_recall_wants_the_second_before() -> None:
    symbols = torch.from_numpy(audio_symbols(SCENES[1]))
    before = torch.zeros_like(symbols)
    before[1:] = symbols[:-1]
    right = recall_loss((before.flatten(0, 1) * 2 - 1) * 20, symbols)
    wrong = recall_loss((symbols.flatten(0, 1) * 2 - 1) * 20, symbols)
    assert right < 1e-6 < wrong


def test_muon_gets_the_hidden_matrices_alone() -> None:
    llm = tiny_llama(300)
    matrices, others = split_matrices(llm)
    assert all(p.ndim == 2 for p in matrices)
    assert len(matrices) == 4 * 7
    # The tied head and the norms.
    assert {tuple(p.shape) for p in others} == {(300, 192), (192,)}


def test_fit_takes_its_steps_and_lowers_a_loss() -> None:
    layer, told = nn.Linear(4, 4), []
    target = torch.eye(4)

    def batches():  # type: ignore[no-untyped-def]
        while True:
            yield torch.eye(4)

    fit(
        {0.02: [layer.bias]},
        batches(),
        lambda x: ((layer(x) - target).pow(2).mean(), {"seen": 1.0}),
        steps=150,
        on_step=lambda step, values: told.append((step, values["loss"])),
        matrices={0.05: [layer.weight]},
    )
    assert [step for step, _ in told] == list(range(1, 151))
    assert told[-1][1] < 0.2 * told[0][1]
