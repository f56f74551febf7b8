"""Crab's own examples as samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.official_sets import write_map

from crab.datasets.examples import read_labelled
from crab.masks import VOC_COLOURS, read_class_map
from crab.tasks import TASKS

REAL = Path(__file__).parents[3] / "shared" / "media" / "crab" / "samples.json"


def test_labels_and_masks(tmp_path: Path) -> None:
    write_map(tmp_path / "s4.png", [(45, 0, 0, 100, 100)])
    colours = np.zeros((50, 50, 3), np.uint8)
    colours[:9] = VOC_COLOURS[14]
    Image.fromarray(colours).save(tmp_path / "avss.png")
    path = tmp_path / "samples.json"
    entries = [
        {"task": "ave", "video": "a.mp4", "label": {"event": "bell", "start_s": 1, "end_s": 2}},
        {"task": "ave", "video": "a.mp4", "label": {"event": "bell"}},
        {"task": "arig", "image": "a.jpg", "audio": "a.wav"},
        {"task": "s4", "image": "a.jpg", "audio": "a.wav", "mask": "s4.png"},
        {"task": "avss", "image": "a.jpg", "audio": "a.wav", "mask": "avss.png"},
        {"task": "ms3", "image": "a.jpg", "audio": "a.wav", "mask": "nowhere.png"},
        {"task": "avqa", "audio": "q.mp3", "question": "Who?", "label": {"answer": "me"}},
    ]
    path.write_text(json.dumps(entries))
    samples, reasons = read_labelled(path)
    assert [sample.id for sample in samples] == ["ave-0", "s4-3", "avss-4", "avqa-6"]
    assert set(reasons) == {"ave-1", "arig-2", "ms3-5"}
    assert samples[1].label == {"event": "mower"}
    assert samples[2].label == {"num_classes": 71, "names": {"14": "clarinet"}}
    assert read_class_map(samples[2].masks[0]).max() == 14
    # The video is not given, and is missed under the name it would have.
    assert samples[3].video == str(tmp_path / "q.mp4")


@pytest.mark.skipif(not REAL.exists(), reason="Crab's media are not on this machine")
def test_the_real_examples() -> None:
    samples, reasons = read_labelled(REAL)
    assert set(reasons) == {"arig-4"}
    assert [sample.task for sample in samples] == [
        "ave",
        "ave",
        "avvp",
        "avqa",
        "s4",
        "ms3",
        "ref-avs",
        "avss",
    ]
    for sample in samples:
        assert TASKS[sample.task].parse(sample.answer) is not None
    names = {
        sample.task: TASKS[sample.task].parse(sample.answer)[0].names
        for sample in samples
        if sample.masks
    }
    # The pictures show a lawn mower, a bearded man, a fire engine, and a man with a clarinet.
    assert (names["s4"], names["ms3"], names["avss"]) == (("mower",), ("man",), ("clarinet",))
