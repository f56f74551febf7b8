"""AVSBench: who sounds, by the pixel (OpenNLPLab/AVSBench, the package of 12,356 videos in v1s, v1m and v2).

`metadata.csv` has a video a row: vid, uid, s_min, s_sec, a_obj, split, label (the part). A video is a folder
`{part}/{uid}` with `frames/{i}.jpg`, `labels_semantic/{i}.png` (class numbers), `labels_rgb/{i}.png` (the same as
colours) and `audio.wav`. Labelled frames: 5 in v1s and v1m, 10 in v2; of v1s train only frame 0.

| part | samples of each labelled frame |
|---|---|
| v1s | s4, avss, and arig by the tight box of the mask at 224 x 224 |
| v1m | ms3, avss |
| v2 | avss |

Names come from the masks where they are there, else from a_obj. A frame in which nothing sounds is answered `none`.
Without its mask a frame has no box, and gives no arig sample.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from crab.datasets.folder import Folder
from crab.datasets.frames import (
    MapContent,
    ahead,
    frame_answer,
    frame_instruction,
    read_content,
    readable,
)
from crab.datasets.report import Found, Origin, Report
from crab.datasets.rows import csv_rows, field
from crab.samples import MaskRef, Sample, Split
from crab.tasks import arig

Part = Literal["v1s", "v1m", "v2"]
Task = Literal["s4", "ms3", "avss", "arig"]

COLUMNS = ("vid", "uid", "s_min", "s_sec", "a_obj", "split", "label")
TASKS_OF_PART: dict[Part, tuple[Task, ...]] = {
    "v1s": ("s4", "arig", "avss"),
    "v1m": ("ms3", "avss"),
    "v2": ("avss",),
}
NUM_FRAMES: dict[Part, int] = {"v1s": 5, "v1m": 5, "v2": 10}

CLASSES = tuple(
    "background accordion airplane axe baby bassoon bell bird boat boy bus car cat cello clarinet clipper clock dog"
    " donkey drum duck elephant emergency-car erhu flute frying-food girl goose guitar gun guzheng hair-dryer handpan"
    " harmonica harp helicopter hen horse keyboard leopard lion man marimba missile-rocket motorcycle mower parrot"
    " piano pig pipa saw saxophone sheep sitar sorna squirrel tabla tank tiger tractor train trombone truck trumpet"
    " tuba ukulele utv vacuum-cleaner violin wolf woman".split()
)
"""The 71 classes by their number in the masks, where the background is 0. The official label2idx.json has the same
order, but counts from 1."""


@dataclass(frozen=True, kw_only=True)
class Video:
    origin: Origin
    uid: str
    part: Part
    split: Split
    a_obj: str
    folder: str
    masks: dict[int, str]
    """Labelled frame -> file."""
    here: frozenset[int]
    """Frames whose mask file is there."""

    @property
    def clip(self) -> str:
        return f"{self.part}/{self.uid}"


Contents = dict[int, MapContent | ValueError]
"""Frame -> what its mask file shows, or why it cannot be read. Only frames whose file is there."""


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError without a `metadata.csv`, ValueError where it is another data set's."""
    path = _metadata(folder)
    classes = read_classes(folder)
    videos = _videos(folder, path, report)
    for video, contents in ahead(read_contents, videos):
        tasks = TASKS_OF_PART[video.part]
        if not video.here and "arig" in tasks:
            report.set_aside(video.origin, "no masks, so no boxes for arig", "left_out")
        for task in tasks:
            yield from samples_of(video, contents, task, classes, report)


def make_video(folder: Folder, base: Path, origin: Origin, row: dict[str, Any]) -> Video:
    """A row of `metadata.csv` with its files; `base` is where the parts lie in the official layout."""
    uid, split, part = field(row, "uid"), field(row, "split"), field(row, "label")
    if part not in NUM_FRAMES:
        raise ValueError(f"label is {part!r}, expected {', '.join(NUM_FRAMES)}")
    if split not in ("train", "val", "test"):
        raise ValueError(f"split is {split!r}, expected train, val, test")
    place = folder.folder(f"{part}/{uid}", base / part / uid)
    frames = 1 if (part, split) == ("v1s", "train") else NUM_FRAMES[part]
    masks, here = {}, set()
    for frame in range(frames):
        kinds = [f"{place}/{kind}/{frame}.png" for kind in ("labels_semantic", "labels_rgb")]
        masks[frame] = next((file for file in kinds if folder.has(file)), kinds[0])
        if folder.has(masks[frame]):
            here.add(frame)
    return Video(
        origin=origin,
        uid=uid,
        part=part,
        split=cast(Split, split),
        a_obj=field(row, "a_obj"),
        folder=place,
        masks=masks,
        here=frozenset(here),
    )


def read_contents(video: Video) -> Contents:
    contents: Contents = {}
    for frame in sorted(video.here):
        try:
            contents[frame] = read_content(MaskRef(frame=0, file=video.masks[frame]))
        except ValueError as error:
            contents[frame] = error
    return contents


def samples_of(
    video: Video, contents: Contents, task: Task, classes: Sequence[str], report: Report
) -> Iterator[Found]:
    """The samples of one task, one a labelled frame."""
    for frame in video.masks:
        content = contents.get(frame)
        if task == "arig" and (
            content is None or (isinstance(content, MapContent) and content.box is None)
        ):
            continue
        try:
            if isinstance(content, ValueError):
                raise content
            yield video.origin, _sample(video, frame, content, task, classes)
        except ValueError as error:
            report.set_aside(video.origin, f"{task}, frame {frame}: {error}")


def read_classes(folder: Folder) -> Sequence[str]:
    """Names by class number: of `label2idx.json` where it is there.

    The official one counts from 1, and the masks from 0 (Crab's example of a mower has 45, its number there is 46), so
    the order is what counts. ValueError unless it numbers 71 classes without gaps, background first.
    """
    path = folder.annotation("label2idx.json")
    if path is None:
        return CLASSES
    numbers = json.loads(path.read_text(encoding="utf-8-sig"))
    names = sorted(numbers, key=lambda name: int(numbers[name]))
    found = [int(numbers[name]) for name in names]
    count = len(CLASSES)
    if found not in (list(range(count)), list(range(1, count + 1))) or names[0] != CLASSES[0]:
        raise ValueError(
            f"{path}: expected {count} classes numbered from 0 or from 1, {CLASSES[0]} first"
        )
    return names


def _metadata(folder: Folder) -> Path:
    others = []
    for path in folder.annotations("metadata.csv"):
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            header = next(csv.reader(lines), [])
        if set(COLUMNS) <= {cell.strip() for cell in header}:
            return path
        others.append((path, header))
    if not others:
        raise FileNotFoundError(f"no metadata.csv below {folder.root}")
    path, header = others[0]
    hint = "; this is Ref-AVS's: import it as ref-avs" if {"fid", "exp"} <= set(header) else ""
    raise ValueError(f"{path}: columns {', '.join(header)}, expected {', '.join(COLUMNS)}{hint}")


def _videos(folder: Folder, path: Path, report: Report) -> Iterator[Video]:
    seen: dict[str, int] = {}
    for origin, row in csv_rows(folder, path, report, COLUMNS):
        try:
            video = make_video(folder, path.parent, origin, row)
        except ValueError as error:
            report.set_aside(origin, str(error))
            continue
        if video.clip in seen:
            reason = f"{video.clip} had a row in line {seen[video.clip]}"
            report.set_aside(origin, reason, "duplicate")
            continue
        seen[video.clip] = origin.line
        yield video


def _sample(
    video: Video, frame: int, content: MapContent | None, task: Task, classes: Sequence[str]
) -> Sample:
    if content is not None and content.classes and content.classes[-1] >= len(classes):
        raise ValueError(
            f"class {content.classes[-1]} in {video.masks[frame]}, expected below {len(classes)}"
        )
    present = content is None or bool(content.classes)
    if content is not None and task in ("ms3", "avss"):
        names = [classes[number] for number in content.classes]
    elif task == "ms3" or task == "avss":
        # How the official file separates several names is not documented; class names have "-" and no "_".
        names = [name for name in re.split(r"[_,;/+&\s]+", video.a_obj) if name]
    else:
        names = [video.a_obj] if present else []
    label: dict[str, Any]
    if task == "arig":
        assert content is not None
        assert content.box is not None
        event = readable(video.a_obj)
        instruction = arig.instruction()
        answer = arig.format_answer(event, content.box)
        label = {"event": event, "box": list(content.box), "second": None}
    else:
        instruction = frame_instruction(task, frame)
        answer = frame_answer(names)
        label = avss_label(names, classes) if task == "avss" else {}
        if task == "s4":
            label = {"event": readable(video.a_obj)}
    mask = MaskRef(frame=0, file=video.masks[frame])
    return Sample(
        id=f"avsbench/{task}/{video.clip}/{frame}",
        task=task,
        split=video.split,
        clip=video.clip,
        image=f"{video.folder}/frames/{frame}.jpg",
        audio=f"{video.folder}/audio.wav",
        instruction=instruction,
        answer=answer,
        label=label,
        masks=() if task == "arig" else (mask,),
    )


def avss_label(names: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """Number of classes, and the names of those in this frame: all 70 in each of 80,000 samples would be 100 MB."""
    numbers = {name: number for number, name in enumerate(classes)}
    here = {str(numbers[name]): readable(name) for name in names if name in numbers}
    return {"num_classes": len(classes), "names": here}
