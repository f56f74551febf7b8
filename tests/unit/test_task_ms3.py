"""MS3: one mask for all that sounds; frames in which nothing does."""

from pathlib import Path

import pytest
from mask_samples import EMPTY, FULL, LEFT, RIGHT, mask_sample, masks, said

from crab.samples import MaskRef
from crab.tasks import TASKS, Answer
from crab.tasks.mask_answer import MaskItem, format_mask_answer

MS3 = TASKS["ms3"]


def test_the_mask_is_that_of_all_chosen_objects(tmp_path: Path) -> None:
    sample = mask_sample(tmp_path, "ms3", [[[1, 2, 3, 0]]])
    file = sample.masks[0].file
    refs = (MaskRef(frame=0, file=file, values=(1, 3)), MaskRef(frame=1, file=file, values=()))
    sample = sample.model_copy(update={"masks": refs})
    assert MS3.score([sample], [said([[[1, 0, 1, 0]], EMPTY])])["miou"] == 1.0
    assert MS3.score([sample], [said([[[1, 1, 1, 0]], LEFT])])["miou"] == pytest.approx(
        (2 / 3 + 1 / 2) / 2
    )


def test_a_frame_in_no_span_is_an_empty_mask(tmp_path: Path) -> None:
    sample = mask_sample(tmp_path, "ms3", [LEFT, EMPTY, FULL])
    items = [
        MaskItem(start_s=0, end_s=1, names=("dog",)),
        MaskItem(start_s=2, end_s=3, names=("dog", "bell")),
    ]
    drawn = masks([LEFT, RIGHT, FULL])
    metrics = MS3.score([sample], [Answer(text=format_mask_answer(items), masks=drawn)])
    assert metrics == {"miou": 1.0, "f": 1.0, "parse_rate": 1.0}
    always = MS3.score([sample], [said([LEFT, RIGHT, FULL])])
    assert always["miou"] == pytest.approx(2.5 / 3)


def test_samples_of_s4_are_not_scored_as_ms3(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'ms3'"):
        MS3.score([mask_sample(tmp_path, "s4", [LEFT])], [said([LEFT])])
    assert MS3.instruction(None) != TASKS["s4"].instruction(None)
    with pytest.raises(ValueError, match="task ms3 asks its own question"):
        MS3.instruction("which?")
