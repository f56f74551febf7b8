"""Answers about loose clips: what is handed back, and the page of them. The model's words are chosen here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

import jobs.predict
from crab.model.collate import Example
from crab.predict import Prediction
from crab.tasks import TASKS, Masks
from crab.tasks.mask_answer import GROUP
from jobs.predict import predict_media
from jobs.spec import SpecError

SAID = {
    "ave": "<event> dog </event> <range> 2,7 </range>",
    "avvp": "<visual_event> dog,(0 4) </visual_event> <audio_event> none </audio_event>",
    "arig": "The sounding object is dog. <obj>(10,20)(30,60)</obj>",
    "avqa": "Heard: a dog. <answer> one </answer>",
    "avcap": "A dog barks.",
} | dict.fromkeys(("s4", "ms3", "avss", "ref-avs"), f"<range> 0,2 </range> dog {GROUP}")
QUESTIONS = {"avqa": "How many dogs?", "ref-avs": "the dog", "arig": "1"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """What the model was asked; it says what `SAID` holds, and draws the left half of each frame."""
    examples: list[Example] = []

    def predict(_model: Any, _collate: Any, given: Sequence[Example], **_: Any) -> list[Prediction]:
        examples.extend(given)
        sample = given[0].sample
        needs = TASKS[sample.task].needs
        masks = None
        if needs in ("mask", "classes"):
            values = np.zeros((2, 224, 224), np.uint8 if needs == "classes" else np.float16)
            values[:, :, :112] = 1
            masks = Masks(frames=(0, 1), values=values)
        text = SAID[sample.task]
        return [
            Prediction(sample_id=sample.id, task=sample.task, text=text, finished=True, masks=masks)
        ]

    monkeypatch.setattr(jobs.predict, "predict", predict)
    monkeypatch.setattr(jobs.predict, "find_adapter", lambda *_: Path("adapter"))
    monkeypatch.setattr(jobs.predict, "load_adapter", lambda *_: (None, None))
    return examples


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two seconds of grey noise, no sound."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(10):
            picture = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("still") / "still.png"
    Image.new("RGB", (64, 64), "green").save(path)
    return str(path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_an_answer_and_a_page(
    asked: list[Example], film: str, tmp_path: Path, task: str
) -> None:
    out = tmp_path / "page"
    (answer,) = predict_media("a", [film], task, QUESTIONS.get(task), out=out)
    assert answer["answer"] is not None
    assert answer["without"] == ["audio"]
    assert answer["page"] == str(out / "index.html")
    page = (out / "index.html").read_text()
    assert page.count("<article") == 1
    assert "Expected" not in page
    assert ("Predicted mask" in page) == (TASKS[task].needs in ("mask", "classes"))
    assert ("Predicted and true box" in page) == (task == "arig")
    assert ('class="timeline"' in page) == (task in ("ave", "avvp"))
    assert asked[0].sample.instruction == TASKS[task].instruction(QUESTIONS.get(task))
    assert {"video"} == asked[0].features.keys()
    assert len(asked[0].features["video"]) > 1  # all layers: masks are drawn on two of them


def test_masks_are_json_values(asked: list[Example], film: str) -> None:
    (answer,) = predict_media("a", [film], "s4")
    assert answer["answer"] == [{"start_s": 0, "end_s": 2, "names": ("dog",)}]
    assert "page" not in answer


def test_a_picture_is_an_image(asked: list[Example], still: str) -> None:
    (answer,) = predict_media("a", [still], "avcap")
    assert asked[0].features.keys() == {"image"}
    assert asked[0].sample.image == still
    assert answer["without"] == ["audio"]


def test_one_broken_clip_does_not_lose_the_others(
    asked: list[Example], film: str, tmp_path: Path
) -> None:
    out = tmp_path / "page"
    answers = predict_media("a", [str(tmp_path / "none.mp4"), film], "ave", out=out)
    assert answers[0]["problem"].startswith("not_found")
    assert answers[1]["page"]
    assert (out / "index.html").read_text().count("<article") == 1


def test_masks_need_a_picture(asked: list[Example], tmp_path: Path) -> None:
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 16_000), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    (answer,) = predict_media("a", [str(sound)], "ms3")
    assert answer["problem"].startswith("no_video_stream")
    assert asked == []


@pytest.mark.parametrize(
    ("task", "question", "words"),
    [
        ("avqa", None, "needs a question"),
        ("ref-avs", "", "needs a question"),
        ("ave", "why?", "leave out"),
        ("arig", "the red one", "no whole number"),
        ("avpq", None, "did you mean"),
    ],
)
def test_questions_that_do_not_fit_are_refused_before_anything_is_loaded(
    task: str, question: str | None, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        predict_media("no adapter", ["no.mp4"], task, question)


def test_a_folder_of_other_things_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        predict_media("no adapter", ["no.mp4"], "ave", out=tmp_path)
