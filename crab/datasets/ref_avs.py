"""Ref-AVS: mask what an expression means (GeWu-Lab/Ref-AVS).

`metadata.csv` has an expression a row: vid, uid, split, fid, exp. The uid is `{video}_{object}_{number}`. Splits
test_s, test_u, test_n (seen, unseen, null) become our test with that subset; 25 official rows of split TODO are set
aside.
Media: `media/{video}/frames/{0..9}.jpg` and `audio.wav`; masks: `gt_mask/{video}/fid_{fid}/0000{i}.png`.

A row gives ten samples, one a frame, whether the media are there or not: media that come later fit. Only where somebody
has a video `{video}.mp4` below the folder, the row is one sample with it and all ten masks, which suits expressions
about time ("the first object to make a sound") better. In a frame without the object the answer is `none`, if its mask
is there to tell; null expressions are `none` everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from crab.datasets.folder import Folder
from crab.datasets.frames import ahead, frame_answer, frame_instruction, readable
from crab.datasets.report import Found, Ids, Origin, Report
from crab.datasets.rows import csv_rows, field, whole
from crab.masks import read_mask
from crab.samples import MaskRef, Sample, Split
from crab.tasks import TASKS
from crab.tasks.mask_answer import MaskItem, format_mask_answer
from crab.tasks.spans import runs

COLUMNS = ("uid", "split", "fid", "exp")
SPLITS: dict[str, tuple[Split, str]] = {
    "train": ("train", "seen"),
    "val": ("val", "seen"),
    "test_s": ("test", "seen"),
    "test_u": ("test", "unseen"),
    "test_n": ("test", "null"),
}
NUM_FRAMES = 10

Shown = dict[int, bool | ValueError]
"""Frame -> whether its mask holds a pixel, or why it cannot be read. Only frames whose file is there."""


@dataclass(frozen=True, kw_only=True)
class Expression:
    origin: Origin
    id: str
    split: Split
    subset: str
    video: str
    name: str
    "of the object that is meant"
    text: str
    media: str
    "folder of its frames and sound"
    clip: str | None
    "video file, where there is one"
    masks: tuple[str, ...]
    here: tuple[int, ...]
    "frames whose mask file is there"


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError without a `metadata.csv`, ValueError where it is another data set's."""
    found = folder.annotations("metadata.csv")
    if not found:
        raise FileNotFoundError(f"no metadata.csv below {folder.root}")
    path = next((path for path in found if _has_expressions(path)), found[0])
    ids = Ids()
    seen: dict[tuple[str, ...], int] = {}

    def expressions() -> Iterator[Expression]:
        for origin, row in csv_rows(folder, path, report, COLUMNS):
            try:
                key = tuple(field(row, name) for name in COLUMNS)
                if key in seen:
                    report.set_aside(origin, f"the same as line {seen[key]}", "duplicate")
                    continue
                seen[key] = origin.line
                if key[-1].strip(". ").upper() == "NO":
                    report.note(
                        "expressions 'NO.', which mean nothing, are kept: the official splits count them"
                    )
                yield make_expression(folder, path.parent, origin, row, ids)
            except ValueError as error:
                report.set_aside(origin, str(error))

    for expression, shown in ahead(read_shown, expressions()):
        yield from samples_of(expression, shown, report)


def make_expression(
    folder: Folder, base: Path, origin: Origin, row: dict[str, Any], ids: Ids
) -> Expression:
    """A row of `metadata.csv` with its files; `base` is where `media` and `gt_mask` lie in the official layout."""
    uid, split, fid = field(row, "uid"), field(row, "split"), whole(row, "fid")
    parts = uid.rsplit("_", 2)
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"uid is {uid!r}, expected {{video}}_{{object}}_{{number}}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected {', '.join(SPLITS)}")
    video = parts[0]
    masks = folder.folder(f"gt_mask/{video}", base / "gt_mask" / video)
    files = tuple(f"{masks}/fid_{fid}/{frame:05d}.png" for frame in range(NUM_FRAMES))
    clip = folder.video(video, base / "media")
    return Expression(
        origin=origin,
        id=ids.take(f"ref-avs/{uid}"),
        split=SPLITS[split][0],
        subset=SPLITS[split][1],
        video=video,
        name=readable(parts[1]),
        text=field(row, "exp"),
        media=folder.folder(f"media/{video}", base / "media" / video),
        clip=clip if folder.has(clip) else None,
        masks=files,
        here=tuple(frame for frame, file in enumerate(files) if folder.has(file)),
    )


def read_shown(expression: Expression) -> Shown:
    if expression.subset == "null":
        return {}
    return {frame: _shows(expression.masks[frame]) for frame in expression.here}


def samples_of(expression: Expression, shown: Shown, report: Report) -> Iterator[Found]:
    broken = [content for content in shown.values() if isinstance(content, ValueError)]
    if broken:
        report.set_aside(expression.origin, str(broken[0]))
        return
    question = expression.text.rstrip(". ")
    is_null = expression.subset == "null"
    values: tuple[int, ...] | None = () if is_null else None
    visible = [not is_null and bool(shown.get(frame, True)) for frame in range(NUM_FRAMES)]
    label = {"expression": expression.text, "subset": expression.subset}
    common: dict[str, Any] = {
        "task": "ref-avs",
        "split": expression.split,
        "clip": expression.video,
        "label": label,
    }
    audio = f"{expression.media}/audio.wav"
    try:
        if expression.clip is not None:
            seconds = sum(1 << frame for frame, on in enumerate(visible) if on)
            items = [
                MaskItem(start_s=start, end_s=end, names=(expression.name,))
                for start, end in runs(seconds)
            ]
            sample = Sample(
                id=expression.id,
                video=expression.clip,
                instruction=TASKS["ref-avs"].instruction(question),
                answer=format_mask_answer(items),
                masks=tuple(
                    MaskRef(frame=frame, file=file, values=values)
                    for frame, file in enumerate(expression.masks)
                ),
                **common,
            )
            yield expression.origin, sample
            return
        for frame, file in enumerate(expression.masks):
            sample = Sample(
                id=f"{expression.id}/{frame}",
                image=f"{expression.media}/frames/{frame}.jpg",
                audio=audio,
                instruction=frame_instruction("ref-avs", frame, question),
                answer=frame_answer([expression.name] if visible[frame] else []),
                masks=(MaskRef(frame=0, file=file, values=values),),
                **common,
            )
            yield expression.origin, sample
    except ValueError as error:
        report.set_aside(expression.origin, str(error))


@lru_cache(maxsize=4096)
def _shows(file: str) -> bool | ValueError:
    """Several expressions mean one object, so its masks are looked at once."""
    try:
        return bool(read_mask(MaskRef(frame=0, file=file)).any())
    except ValueError as error:
        return error
    except OSError as error:
        return ValueError(f"mask file {file} cannot be read: {error}")


def _has_expressions(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return set(COLUMNS) <= {cell.strip() for cell in lines.readline().split(",")}
