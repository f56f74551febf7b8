"""Answers on disk: what was said comes back, masks one at a time, and a run before leaves nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from crab.samples import Sample
from crab.tasks import Masks
from jobs.predictions import PREDICTIONS, Predictions, Said, masks_to_npz, read_masks


def sample(number: int) -> Sample:
    return Sample(
        id=f"s{number}",
        task="ms3",
        split="test",
        clip="c",
        video="/clips/c.mp4",
        instruction="Mask it.",
        answer="<range> none </range>",
        label={},
    )


def said(text: str, masks: Masks | None = None) -> Said:
    npz = None if masks is None else masks_to_npz(masks)
    return Said(text=text, finished=True, goodness=0.5, masks=npz)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_masks_come_back_as_they_were(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(0).integers(0, 13, (3, 224, 224)).astype(dtype) / dtype(1)
    masks = Masks(frames=(0, 2, 9), values=values.astype(dtype))
    data = masks_to_npz(masks)
    assert len(data) < values.astype(dtype).nbytes / 1.5
    (tmp_path / "m.npz").write_bytes(data)
    again = read_masks(tmp_path / "m.npz")
    assert again.frames == (0, 2, 9)
    assert again.values.dtype == dtype
    np.testing.assert_array_equal(again.values, masks.values)


def test_answers_are_looked_up_by_sample_and_written_in_the_order_of_the_samples(
    tmp_path: Path,
) -> None:
    samples = [sample(number) for number in range(3)]
    answers = Predictions(tmp_path, samples)
    masks = Masks(frames=(0,), values=np.full((1, 4, 4), 0.25, np.float16))
    answers.add("s2", said("two", masks))
    answers.add("s0", said("zero"))
    assert sorted(answers) == ["s0", "s2"]
    assert (answers["s0"].text, answers["s0"].masks) == ("zero", None)
    found = answers["s2"].masks
    assert found is not None
    np.testing.assert_array_equal(found.values, masks.values)
    assert answers.get("s1") is None
    assert answers.masks_bytes() == len(masks_to_npz(masks))

    answers.write()
    rows = [json.loads(line) for line in (tmp_path / PREDICTIONS).read_text().splitlines()]
    assert [row["sample"]["id"] for row in rows] == ["s0", "s1", "s2"]
    assert [row["text"] for row in rows] == ["zero", None, "two"]
    assert [row["goodness"] for row in rows] == [0.5, None, 0.5]
    assert [row["masks"] for row in rows] == [None, None, "masks/000002.npz"]
    assert Sample.model_validate(rows[1]["sample"]) == samples[1]
    assert read_masks(tmp_path / rows[2]["masks"]).frames == (0,)


def test_a_run_before_leaves_no_masks(tmp_path: Path) -> None:
    masks = Masks(frames=(0,), values=np.zeros((1, 4, 4), np.uint8))
    before = Predictions(tmp_path, [sample(0), sample(1)])
    before.add("s1", said("old", masks))
    before.write()
    Predictions(tmp_path, [sample(0)])
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
