"""AV-UIE: Crab's own instruction data over seven official sets (GeWu-Lab/Crab, HF `ahsgdxhs/AVUIE`, nine JSON files).

Any `*samples.json` below the folder is read; what an entry is shows in its fields, as Crab's loader names them
(reference: `dataset/unified_dataset.py`):

| fields | task |
|---|---|
| question_id, question, answer | avqa |
| vid, event, start_time, end_time | ave |
| filename, event, label (reasoning text) | avvp |
| uid, a_obj, label v1s, v1m, v2 | s4, ms3, avss (avss for all in a file called so) |
| top_left, bottom_right, a_obj, frame_path | arig; x = 1000 says that nothing sounds |
| uid, exp, fid | ref-avs |
| video_id, desc | avcap |

Media lie as in the official sets. Paths in entries are those of the authors' cluster: only their last parts are used.
Reasoning of AVE and AVQA is a text of its own, `converted_label/{vid or question_id}.txt`. It is taken only if its
tagged answer is the entry's, and is reported otherwise; the sample is written without it. AVVP answers are written
`<visual>Name,(s e)</visual> and <audio>...</audio>`, and become our tags; an entry without such a text gives a weak
sample, as in LLP.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crab.datasets import avsbench, ref_avs, valor
from crab.datasets.avsbench import CLASSES as MASK_CLASSES
from crab.datasets.avsbench import Task as FrameTask
from crab.datasets.folder import Folder
from crab.datasets.frames import readable
from crab.datasets.llp import CLASSES, video_id
from crab.datasets.music_avqa import fill, parse_list
from crab.datasets.report import Found, Ids, Origin, Report
from crab.datasets.rows import field, json_rows, whole
from crab.samples import Sample, Split
from crab.tasks import arig, ave, avqa, avvp
from crab.tasks.base import normalise

NOTHING_SOUNDS = 1000
"x of an ARIG box of a frame in which nothing sounds."

_KINDS = (
    ("avqa", {"question_id", "question", "answer"}),
    ("ave", {"vid", "event", "start_time", "end_time"}),
    ("arig", {"top_left", "bottom_right", "a_obj", "frame_path"}),
    ("ref-avs", {"uid", "exp", "fid"}),
    ("frames", {"uid", "a_obj", "label"}),
    ("avvp", {"filename", "event"}),
    ("avcap", {"video_id", "desc"}),
)
_TASK_OF_PART: dict[str, FrameTask] = {"v1s": "s4", "v1m": "ms3", "v2": "avss"}
_LISTS = re.compile(r"<(visual|audio)(?:_event)?>(.*?)</\1(?:_event)?>", re.DOTALL)
_ITEM = re.compile(r"([^,;()<>\s][^;()<>]*?)\s*,?\s*((?:\(\s*\d+[\s,]+\d+\s*\)[\s,]*)+)")
_SPAN = re.compile(r"\(\s*(\d+)[\s,]+(\d+)\s*\)")
_AVE = re.compile(r"<event>(.*?)</event>.*?<range>\s*(\d+)\s*,\s*(\d+)\s*</range>", re.DOTALL)
_AVQA = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError where no file is called `*samples.json`."""
    paths = folder.named("samples.json")
    if not paths:
        raise FileNotFoundError(f"no *samples.json below {folder.root}")
    reader = _Reader(folder, report)
    for path in paths:
        for origin, row in json_rows(folder, path, report):
            try:
                yield from reader.samples(path, origin, row)
            except ValueError as error:
                report.set_aside(origin, str(error))


class _Reader:
    def __init__(self, folder: Folder, report: Report) -> None:
        self._folder = folder
        self._report = report
        self._ids = Ids()

    def samples(self, path: Path, origin: Origin, row: dict[str, Any]) -> Iterator[Found]:
        kind = next((name for name, fields in _KINDS if fields <= row.keys()), None)
        base = path.parent
        if kind is None:
            raise ValueError(f"fields {', '.join(row)} are of no task")
        if kind == "frames":
            part = field(row, "label")
            task = "avss" if "avss" in path.name else _TASK_OF_PART.get(part, "avss")
            video = avsbench.make_video(self._folder, base, origin, row)
            contents = avsbench.read_contents(video)
            for found, sample in avsbench.samples_of(
                video, contents, task, MASK_CLASSES, self._report
            ):
                yield found, self._named(sample)
            return
        if kind == "ref-avs":
            expression = ref_avs.make_expression(self._folder, base, origin, row, Ids())
            shown = ref_avs.read_shown(expression)
            for found, sample in ref_avs.samples_of(expression, shown, self._report):
                yield found, self._named(sample)
            return
        split = _split(path, row)
        if kind == "arig":
            if _point(row, "top_left")[0] == NOTHING_SOUNDS:
                self._report.set_aside(origin, "nothing sounds in this frame", "left_out")
                return
            sample = self._arig(base, row, split)
        elif kind == "avcap":
            clip, caption = field(row, "video_id"), valor.plain(field(row, "desc"))
            sample = valor.sample(clip, clip, split, self._folder, base, [caption])
        elif kind == "avqa":
            sample = self._avqa(base, origin, row, split)
        elif kind == "ave":
            sample = self._ave(base, origin, row, split)
        else:
            sample = self._avvp(base, origin, row, split)
        yield origin, self._named(sample)

    def _named(self, sample: Sample) -> Sample:
        return sample.model_copy(update={"id": self._ids.take(f"av-uie/{sample.task}/{sample.id}")})

    def _clip(self, stem: str, base: Path, videos: str) -> dict[str, Any]:
        """Video, and its sound as Crab extracts it (`audio_data/{stem}.mp3`) where that is there."""
        media = {"video": self._folder.video(stem, base / videos)}
        audio = self._folder.file(f"{stem}.mp3", base / "audio_data" / f"{stem}.mp3")
        return media | ({"audio": audio} if self._folder.has(audio) else {})

    def _ave(self, base: Path, origin: Origin, row: dict[str, Any], split: Split) -> Sample:
        video, event = field(row, "vid"), field(row, "event")
        start, end = whole(row, "start_time"), whole(row, "end_time")
        if not 0 <= start < end <= 10:
            raise ValueError(f"span {start},{end} given, expected 0 <= start < end <= 10 seconds")
        reasoning = self._reasoning(origin, video, base, _AVE, (normalise(event), start, end))
        return Sample(
            id=video,
            task="ave",
            split=split,
            clip=video,
            **self._clip(video, base, "AVE"),
            instruction=ave.INSTRUCTION,
            reasoning=reasoning,
            answer=ave.format_answer(event, start, end),
            label={"event": event, "start_s": start, "end_s": end},
        )

    def _avqa(self, base: Path, origin: Origin, row: dict[str, Any], split: Split) -> Sample:
        video, number, answer = (field(row, name) for name in ("video_id", "question_id", "answer"))
        kind = parse_list(row, "type") if "type" in row else []
        question = fill(field(row, "question"), [])
        reasoning = self._reasoning(origin, number, base, _AVQA, (normalise(answer),))
        return Sample(
            id=number,
            task="avqa",
            split=split,
            clip=video,
            **self._clip(video, base, "video"),
            instruction=avqa.instruction(question),
            reasoning=reasoning,
            answer=avqa.format_answer(answer),
            label={"answer": answer, "type": kind},
        )

    def _avvp(self, base: Path, origin: Origin, row: dict[str, Any], split: Split) -> Sample:
        clip = field(row, "filename")
        common: dict[str, Any] = {
            "id": clip,
            "task": "avvp",
            "split": split,
            "clip": clip,
            **self._clip(video_id(clip), base, "llp_videos"),
            "instruction": avvp.INSTRUCTION,
        }
        text = row.get("label")
        if isinstance(text, str) and text.strip():
            try:
                prose, events = parse_events(text)
                answer = avvp.format_answer(events["visual"], events["audio"])
                return Sample(reasoning=prose, answer=answer, label=events, **common)
            except ValueError as error:
                self._report.set_aside(origin, f"{error}: written as weakly labelled")
        names = [class_name(name.strip()) for name in field(row, "event").split(",")]
        return Sample(answer=", ".join(names), label={"weak": names}, **common)

    def _arig(self, base: Path, row: dict[str, Any], split: Split) -> Sample:
        part, uid, _, frame = Path("/0/0/0", field(row, "frame_path")).parts[-4:]
        if part not in _TASK_OF_PART:
            raise ValueError(
                f"frame_path is {row['frame_path']!r}, expected .../v1s/uid/frames/i.jpg"
            )
        place = self._folder.folder(f"{part}/{uid}", base / part / uid)
        x1, y1 = _point(row, "top_left")
        x2, y2 = _point(row, "bottom_right")
        event = readable(field(row, "a_obj"))
        return Sample(
            id=f"{part}/{uid}/{Path(frame).stem}",
            task="arig",
            split=split,
            clip=f"{part}/{uid}",
            image=f"{place}/frames/{frame}",
            audio=f"{place}/audio.wav",
            instruction=arig.instruction(),
            answer=arig.format_answer(event, (x1, y1, x2, y2)),
            label={"event": event, "box": [x1, y1, x2, y2], "second": None},
        )

    def _reasoning(
        self,
        origin: Origin,
        stem: str,
        base: Path,
        tags: re.Pattern[str],
        truth: tuple[str | int, ...],
    ) -> str:
        """The prose before the first tag of `converted_label/{stem}.txt`, if its answer is the true one; else ""."""
        official = base / "converted_label" / f"{stem}.txt"
        path = self._folder.file(official.name, official)
        if not self._folder.has(path):
            return ""
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
        match = tags.search(text)
        given = (
            tuple(int(g) if g.isdigit() else normalise(g) for g in match.groups())
            if match
            else None
        )
        prose = " ".join(text[: match.start()].split()) if match else ""
        where = self._folder.relative(Path(path))
        if given != truth:
            reason = f"{where} answers {given}, the entry {truth}: reasoning left out"
        elif "<" in prose or ">" in prose or "�" in prose:
            reason = f"{where} has stray tags or bytes before the answer: reasoning left out"
        else:
            return prose
        self._report.set_aside(origin, reason)
        return ""


def class_name(name: str) -> str:
    """An LLP class by its official name, or by ours."""
    name = CLASSES.get(name, name)
    if name not in CLASSES.values():
        raise ValueError(f"event {name!r} is none of the 25 classes of LLP")
    return name


def parse_events(text: str) -> tuple[str, dict[str, list[tuple[str, int, int]]]]:
    """(prose, events by stream) of Crab's AVVP text. ValueError where anything in a tag is no event with spans."""
    found = list(_LISTS.finditer(text))
    if not found:
        raise ValueError("no <visual> or <audio> events in the label")
    prose = " ".join(text[: found[0].start()].split())
    if "<" in prose or ">" in prose:
        raise ValueError("stray tags before the events in the label")
    events: dict[str, list[tuple[str, int, int]]] = {"visual": [], "audio": []}
    for match in found:
        for name, spans in _ITEM.findall(match[2]):
            events[match[1]] += [
                (class_name(name.strip()), int(s), int(e)) for s, e in _SPAN.findall(spans)
            ]
        if rest := _ITEM.sub("", match[2]).strip(" ,;.\n\t"):
            if normalise(rest) != "none":
                raise ValueError(f"{rest!r} in the label is no event with spans")
    for _, start, end in [*events["visual"], *events["audio"]]:
        if not 0 <= start < end <= 10:
            raise ValueError(f"span ({start} {end}) in the label, expected 0 <= start < end <= 10")
    return prose, events


def _point(row: dict[str, Any], name: str) -> tuple[int, int]:
    """Pixels in the picture at 224 x 224."""
    point = row[name]
    if not isinstance(point, list) or len(point) != 2:
        raise ValueError(f"{name} is {point!r}, expected [x, y]")
    x, y = (whole({name: value}, name) for value in point)
    return x, y


def _split(path: Path, row: dict[str, Any]) -> Split:
    given = row.get("split")
    if given in ("train", "val", "test"):
        return given
    # `valid_train` is Crab's name for the train entries that passed its check.
    for split in ("train", "test", "val"):
        if split in path.name:
            return split
    raise ValueError(f"no split in the entry, and none in the name of the file {path.name}")
