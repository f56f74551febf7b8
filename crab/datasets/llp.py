"""LLP, the data set of audio-visual video parsing: 11,849 clips of 10 s (YapengTian/AVVP-ECCV20).

`AVVP_eval_audio.csv` and `AVVP_eval_visual.csv` have the exact events of the clips of val and test, one a line, spans
half-open. `AVVP_train.csv`, `AVVP_val_pd.csv` and `AVVP_test_pd.csv` name the events of each clip without saying when,
or whether they are seen or heard. A clip with exact events becomes a sample with them, and its weak row is only counted
("covered"). Any other weak row becomes a weak sample: label {"weak": [names]}, answer the names with commas. That is no
AVVP answer, on purpose: nothing here knows the spans, so training leaves such samples out with a reason.

Some official events have no length (`9 9`): they are set aside, and their clip keeps its exact label without them, as
the official evaluation marks no second for them. It also scores clips of val and test without any exact event as empty;
here they are weak.

The eval files also hold clips that stand in none of the three lists (some with damaged ids, `P7x4FV4lg_570_580`): about
one in thirty. The official evaluation goes by the lists and never meets them, so they are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path

from crab.datasets.folder import Folder
from crab.datasets.report import Found, Origin, Report
from crab.datasets.rows import csv_rows, field, whole
from crab.samples import Sample, Split
from crab.tasks import avvp
from crab.tasks.spans import NUM_SECONDS

_WEAK: dict[str, Split] = {
    "AVVP_train.csv": "train",
    "AVVP_val_pd.csv": "val",
    "AVVP_test_pd.csv": "test",
}
_EXACT = {"visual": "AVVP_eval_visual.csv", "audio": "AVVP_eval_audio.csv"}

CLASSES = {
    name: name.replace("_(food)", " food").replace("_", " ")
    for name in (
        "Speech Car Cheering Dog Cat Frying_(food) Basketball_bounce Fire_alarm Chainsaw Cello Banjo Singing"
        " Chicken_rooster Violin_fiddle Vacuum_cleaner Baby_laughter Accordion Lawn_mower Motorcycle Helicopter"
        " Acoustic_guitar Telephone_bell_ringing Baby_cry_infant_cry Blender Clapping"
    ).split()
}
"""Official class name -> the name in our samples. One to one, so it can be read backwards. Ours have no underscores,
and no brackets: these enclose the spans in an AVVP answer."""


@dataclass
class _Clip:
    """The exact events of one clip, from the lines of two files."""

    origin: Origin
    visual: list[tuple[str, int, int]] = dataclass_field(default_factory=list)
    audio: list[tuple[str, int, int]] = dataclass_field(default_factory=list)
    broken: bool = False
    "One of its lines does not fit, so what is left is not the whole truth."


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError where none of the five files is there."""
    weak = {name: path for name in _WEAK if (path := folder.annotation(name)) is not None}
    exact = {stream: path for stream, name in _EXACT.items() if (path := folder.annotation(name))}
    if not weak and not exact:
        raise FileNotFoundError(
            f"none of {', '.join([*_WEAK, *_EXACT.values()])} below {folder.root}"
        )
    for name in [*_WEAK, *_EXACT.values()]:
        if folder.annotation(name) is None:
            report.note(f"no {name} below the folder")
    # Half of the truth is none: with one of the two files every clip would seem silent, or empty.
    clips = _exact(folder, exact, report) if len(exact) == len(_EXACT) else {}
    if exact and not clips:
        report.note("exact labels need both AVVP_eval_audio.csv and AVVP_eval_visual.csv: not used")
    rows = {name: _weak_rows(folder, path, report) for name, path in weak.items()}
    splits = {clip: split for name, split in _WEAK.items() for _, clip, _ in rows.get(name, [])}
    videos = next(iter([*exact.values(), *weak.values()])).parent / "LLP_dataset" / "video"
    # Without one of the two lists nobody can tell; with both such a clip is of no official split.
    has_lists = {"AVVP_val_pd.csv", "AVVP_test_pd.csv"} <= weak.keys()
    unplaced = 0
    for clip, events in clips.items():
        if events.broken:
            continue
        if clip not in splits:
            if has_lists:
                reason = f"clip {clip} stands in no AVVP_*_pd.csv, so it is of no official split"
                report.set_aside(events.origin, reason, "left_out")
                continue
            unplaced += 1
        yield events.origin, _exact_sample(folder, videos, clip, splits.get(clip, "test"), events)
    if unplaced:
        report.note(
            f"{unplaced} clips with exact events stand in no AVVP_*_pd.csv here: they went to test"
        )
    seen: dict[str, int] = {}
    for name, found in rows.items():
        for origin, clip, names in found:
            if clip in clips and not clips[clip].broken:
                report.counts["covered"] += 1
            elif clip in seen:
                report.set_aside(origin, f"clip {clip} had a row in line {seen[clip]}", "duplicate")
            else:
                yield origin, _weak_sample(folder, videos, clip, _WEAK[name], names)
            seen[clip] = origin.line


def video_id(clip: str) -> str:
    """`{YouTube id}_{start}_{end}` -> the id; videos are named by it."""
    parts = clip.rsplit("_", 2)
    if len(parts) != 3 or not parts[0] or not (parts[1] + parts[2]).isdigit():
        raise ValueError(f"filename is {clip!r}, expected {{YouTube id}}_{{start}}_{{end}}")
    return parts[0]


def _class(name: str) -> str:
    if name not in CLASSES:
        raise ValueError(f"event {name!r} is none of the 25 classes of LLP")
    return CLASSES[name]


def _exact(folder: Folder, paths: dict[str, Path], report: Report) -> dict[str, _Clip]:
    clips: dict[str, _Clip] = {}
    columns = ("filename", "onset", "offset", "event_labels")
    for stream, path in paths.items():
        for origin, row in csv_rows(folder, path, report, columns, "\t"):
            clip = None
            try:
                name = field(row, "filename")
                video_id(name)
                clip = clips.setdefault(name, _Clip(origin=origin))
                start, end = whole(row, "onset"), whole(row, "offset")
                if not 0 <= start <= end <= NUM_SECONDS:
                    raise ValueError(
                        f"span {start},{end} given, expected 0 <= onset < offset <= {NUM_SECONDS} seconds"
                    )
                event = _class(field(row, "event_labels"))
                if start == end:
                    reason = f"span {start},{end} covers no second; its clip has no such event"
                    report.set_aside(origin, reason)
                else:
                    getattr(clip, stream).append((event, start, end))
            except ValueError as error:
                if clip is not None:
                    clip.broken = True
                report.set_aside(origin, f"{error}; its clip counts as weakly labelled")
    return clips


def _weak_rows(folder: Folder, path: Path, report: Report) -> list[tuple[Origin, str, list[str]]]:
    """(origin, clip, names): 11,849 rows in all, so they are kept."""
    rows = []
    for origin, row in csv_rows(folder, path, report, ("filename", "event_labels"), "\t"):
        try:
            clip = field(row, "filename")
            video_id(clip)
            names = [_class(name.strip()) for name in field(row, "event_labels").split(",")]
        except ValueError as error:
            report.set_aside(origin, str(error))
        else:
            rows.append((origin, clip, list(dict.fromkeys(names))))
    return rows


def _exact_sample(folder: Folder, videos: Path, clip: str, split: Split, events: _Clip) -> Sample:
    return Sample(
        id=f"llp/{clip}",
        task="avvp",
        split=split,
        clip=clip,
        video=folder.video(video_id(clip), videos),
        instruction=avvp.INSTRUCTION,
        answer=avvp.format_answer(events.visual, events.audio),
        label={
            "visual": [list(e) for e in events.visual],
            "audio": [list(e) for e in events.audio],
        },
    )


def _weak_sample(folder: Folder, videos: Path, clip: str, split: Split, names: list[str]) -> Sample:
    return Sample(
        id=f"llp/{clip}",
        task="avvp",
        split=split,
        clip=clip,
        video=folder.video(video_id(clip), videos),
        instruction=avvp.INSTRUCTION,
        answer=", ".join(names),
        label={"weak": names},
    )
