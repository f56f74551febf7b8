"""The examples that come with Crab's release: a samples.json beside a folder of media a task.

`read_examples` gives all of them, for what has to be decoded. `read_labelled` gives those with a label as test samples.
A mask file is the label of the mask tasks: one channel of class numbers (S4, MS3), one of 0 and 255 (Ref-AVS), or the
colours of AVSBench's 71 classes (AVSS); class numbers name the objects. The ARIG example has no label at all.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from crab.datasets.avsbench import CLASSES, avss_label
from crab.datasets.frames import frame_answer, read_content, readable
from crab.masks import read_mask
from crab.samples import MaskRef, Sample, Stream
from crab.tasks import TASKS, ave, avqa, avvp


class Example(BaseModel):
    """One entry of samples.json; media are absolute paths once read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = ""
    task: str = Field(min_length=1)
    video: str | None = None
    audio: str | None = None
    image: str | None = None
    mask: str | None = None
    question: str = ""
    expression: str = ""
    label: dict[str, Any] = {}
    note: str = ""

    def media(self) -> list[tuple[str, Stream]]:
        """(path, stream) of what has to be decoded: as `Sample.media`."""
        named: list[tuple[str | None, Stream]] = [
            (self.video, "video"),
            (self.audio or self.video, "audio"),
            (self.image, "image"),
        ]
        return [(path, stream) for path, stream in named if path is not None]


def read_examples(path: str | Path) -> list[Example]:
    """All examples of a samples.json, their media as absolute paths, with ids "<task>-<number>".

    An example that is asked about a video which is not named (Crab's AVQA example brings only its audio) gets the path
    where its video would lie, so that it is reported as missing and not passed over.

    Raises ValueError naming the file for text that is not a list of examples.
    """
    path = Path(path)
    try:
        found = TypeAdapter(list[Example]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: not a list of Crab's examples: {error}") from error
    folder = os.path.dirname(os.path.abspath(path))

    def place(name: str | None) -> str | None:
        return os.path.join(folder, name) if name else None

    examples = []
    for number, example in enumerate(found):
        video = example.video
        if video is None and example.image is None and example.audio is not None:
            video = str(Path(example.audio).with_suffix(".mp4"))
        examples.append(
            example.model_copy(
                update={
                    "id": f"{example.task}-{number}",
                    "video": place(video),
                    "audio": place(example.audio),
                    "image": place(example.image),
                    "mask": place(example.mask),
                }
            )
        )
    return examples


def read_labelled(path: str | Path) -> tuple[list[Sample], dict[str, str]]:
    """(samples, reasons): a test sample of each example with a label, and for each other id why there is none.

    Ids are those of `read_examples`. Raises ValueError naming the file for text that is not a list of examples.
    """
    samples, reasons = [], {}
    for example in read_examples(path):
        try:
            samples.append(_sample(example))
        except KeyError as error:
            reasons[example.id] = f"its label has no {error}"
        except (ValueError, FileNotFoundError) as error:
            reasons[example.id] = str(error)
    return samples, reasons


def _sample(example: Example) -> Sample:
    """ValueError, KeyError or FileNotFoundError where its label is not there or does not fit."""
    if not example.label and example.mask is None:
        raise ValueError("has no label")
    label, question = dict(example.label), None
    masks: tuple[MaskRef, ...] = ()
    if example.task == "ave":
        answer = ave.format_answer(label["event"], label["start_s"], label["end_s"])
    elif example.task == "avvp":
        answer = avvp.format_answer(label["visual"], label["audio"])
    elif example.task == "avqa":
        answer, question = avqa.format_answer(label["answer"]), example.question
    elif example.mask is not None:
        mask = MaskRef(frame=0, file=example.mask)
        masks, question = (mask,), example.expression or None
        answer, label = _masked(example, mask)
    else:
        raise ValueError(f"task {example.task!r} has a label that is not read here: {label}")
    return Sample(
        id=example.id,
        task=example.task,
        split="test",
        clip=example.id,
        video=example.video,
        audio=example.audio,
        image=example.image,
        instruction=TASKS[example.task].instruction(question),
        answer=answer,
        label=label,
        masks=masks,
    )


def _masked(example: Example, mask: MaskRef) -> tuple[str, dict[str, Any]]:
    """(answer, label) by what the mask file shows."""
    if example.task == "ref-avs":
        # Neither the expression nor the mask says what kind of object it is.
        answer = frame_answer(["object"] if read_mask(mask).any() else [])
        return answer, {"expression": example.expression, "subset": "seen"}
    names = [CLASSES[number] for number in read_content(mask).classes]
    if example.task == "avss":
        return frame_answer(names), avss_label(names, CLASSES)
    return frame_answer(names), {"event": readable(names[0])} if example.task == "s4" else {}
