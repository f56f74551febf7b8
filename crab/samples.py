"""Samples: one question about one clip, with the exact answer. One JSON line each in `samples.jsonl`.

Every source (AV-Shapes, official data sets) becomes this one model, so nothing downstream knows where a clip came
from. Media are named by path or URL and are not opened here. A reader must find a wrong line fast, so every error of
`read_samples` starts with `file:line`.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Stream = Literal["video", "audio", "image"]
Split = Literal["train", "val", "test"]


class MaskRef(BaseModel):
    """The true mask of one frame: some or all of the pixels of an image file.

    Data sets have one frame a second, so frame i stands for second i; a sample with an image has frame 0 alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    frame: int = Field(ge=0)
    file: str = Field(min_length=1)
    """PNG, named as media are."""
    values: tuple[int, ...] | None = None
    """Pixels with one of these values belong to the mask; None: every pixel that is not 0; (): the mask is empty."""


class Sample(BaseModel):
    """One instruction, its reasoning and its tagged answer.

    `video`, `audio`, `image` are absolute paths, URLs, or paths relative to the samples file. `audio` left out while
    `video` is set means the audio track of the video. `label` is the exact label that the scorers read; its shape
    depends on the task (see `crab/tasks`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    task: str = Field(min_length=1)
    split: Split
    clip: str = Field(min_length=1)
    video: str | None = None
    audio: str | None = None
    image: str | None = None
    instruction: str = Field(min_length=1)
    reasoning: str = ""
    answer: str = Field(min_length=1)
    label: dict[str, Any]
    masks: tuple[MaskRef, ...] = ()

    @model_validator(mode="after")
    def _has_media(self) -> Self:
        if self.video is None and self.audio is None and self.image is None:
            raise ValueError("a sample needs at least one of video, audio, image")
        return self

    @model_validator(mode="after")
    def _has_one_mask_a_frame(self) -> Self:
        frames = [mask.frame for mask in self.masks]
        if len(set(frames)) < len(frames):
            raise ValueError(f"masks for the frames {frames} given, expected one a frame at most")
        return self

    def media(self) -> list[tuple[str, Stream]]:
        """What has to be decoded for this sample, as (path or URL, stream).

        Paths are as they stand in the sample: `read_samples` has resolved them already, a sample built by hand may
        want `resolve` first.
        """
        needed: list[tuple[str, Stream]] = []
        if self.video is not None:
            needed.append((self.video, "video"))
        audio = self.audio if self.audio is not None else self.video
        if audio is not None:
            needed.append((audio, "audio"))
        if self.image is not None:
            needed.append((self.image, "image"))
        return needed

    def resolve(self, base: str | Path) -> "Sample":
        """The same sample with relative paths of media and masks joined to the folder (or URL) `base`."""
        here = str(base)
        media = {
            name: _join(here, value)
            for name in ("video", "audio", "image")
            if (value := getattr(self, name)) is not None
        }
        masks = tuple(
            mask.model_copy(update={"file": _join(here, mask.file)}) for mask in self.masks
        )
        return self.model_copy(update={**media, "masks": masks})


def read_samples(path: str | Path, *, resolve: bool = True) -> list[Sample]:
    """All samples of a JSONL file (a local path or any fsspec URL), in the order of the file.

    Media paths are resolved against the folder of the file unless `resolve=False`. Blank lines are skipped. Raises
    ValueError with `file:line` for text that is not JSON, for a line that does not fit the model, and for an id that
    was used before.
    """
    source = str(path)
    base = _parent(source)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    with fsspec.open(source, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            sample = _parse_line(line, f"{source}:{number}")
            if sample.id in seen:
                raise ValueError(
                    f"{source}:{number}: sample id {sample.id!r} was used in line {seen[sample.id]};"
                    " ids must be unique in a file: give one of the two another id"
                )
            seen[sample.id] = number
            samples.append(sample.resolve(base) if resolve else sample)
    return samples


def write_samples(path: str | Path, samples: Iterable[Sample]) -> Path:
    """Write a JSONL file whole or not at all (temporary name, fsync, rename). Local paths only.

    Raises ValueError when two samples share an id: nothing is written then.
    """
    target = Path(path)
    rows = list(samples)
    seen: set[str] = set()
    for sample in rows:
        if sample.id in seen:
            raise ValueError(
                f"two samples have the id {sample.id!r}; ids must be unique in {target}"
            )
        seen.add(sample.id)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as out:
            out.writelines(sample.model_dump_json(exclude_none=True) + "\n" for sample in rows)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _parse_line(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); expected one sample object a line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: {type(row).__name__} given, expected one sample object a line"
            " (is the file a JSON list? write one object a line instead)"
        )
    try:
        return Sample.model_validate(row)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'sample'}: {problem['msg']}"
            for problem in error.errors()
        )
        known = ", ".join(Sample.model_fields)
        raise ValueError(f"{where}: {problems}. A sample has the fields {known}") from error


def _is_url(path: str) -> bool:
    return "://" in path


def _parent(path: str) -> str:
    """The folder of a file, as a URL for a URL and as an absolute path otherwise."""
    return path.rsplit("/", 1)[0] if _is_url(path) else str(Path(path).absolute().parent)


def _join(base: str, path: str) -> str:
    if _is_url(path) or Path(path).is_absolute():
        return path
    return f"{base.rstrip('/')}/{path}" if _is_url(base) else str(Path(base) / path)
