"""The examples that come with Crab's release: a samples.json beside a folder of media a task.

Only what has to be decoded is read here. Most of the tasks in it (boxes, masks) have labels that are no text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from crab.samples import Stream


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
