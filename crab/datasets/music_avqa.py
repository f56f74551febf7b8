"""MUSIC-AVQA: 45,867 questions about 9288 clips of 60 s of music (GeWu-Lab/MUSIC-AVQA).

`avqa-train.json`, `avqa-val.json`, `avqa-test.json` are lists of questions. The repository holds two sets of them:
`data/json_update`, the corrected one (9129 test questions), is read before `data/json` (9185). The question has slots
(`Is the <Object> in the video always playing?`) that `templ_values`, a list in a string, fills in order. The answer is
called `anser` there. Questions with `question_deleted` 1 are left out, and reported.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crab.datasets.folder import Folder
from crab.datasets.report import Found, Report
from crab.datasets.rows import field, json_rows
from crab.samples import Sample, Split
from crab.tasks import avqa

FILES: dict[Split, str] = {
    "train": "avqa-train.json",
    "val": "avqa-val.json",
    "test": "avqa-test.json",
}
_SETS = ("json_update", "json")
_SLOT = re.compile(r"<[^<>]*>")


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError where none of the three files is there."""
    seen: dict[str, str] = {}
    found = {split: folder.annotation(name, prefer=_SETS) for split, name in FILES.items()}
    if not any(found.values()):
        raise FileNotFoundError(f"none of {', '.join(FILES.values())} below {folder.root}")
    for split, path in found.items():
        if path is None:
            report.note(f"no {FILES[split]} below the folder")
            continue
        for other in folder.annotations(FILES[split]):
            if other != path:
                report.note(f"{folder.relative(other)} was not read, {folder.relative(path)} was")
        data = path.parent.parent if path.parent.name in _SETS else path.parent
        for origin, row in json_rows(folder, path, report):
            try:
                if row.get("question_deleted") == 1:
                    report.set_aside(origin, "question_deleted is 1", "left_out")
                    continue
                sample = _sample(row, split, folder, data / "video")
                if sample.id in seen:
                    report.set_aside(
                        origin, f"question_id was used in {seen[sample.id]}", "duplicate"
                    )
                    continue
                seen[sample.id] = f"{origin.file}:{origin.line}"
                yield origin, sample
            except ValueError as error:
                report.set_aside(origin, str(error))


def fill(question: str, values: list[Any]) -> str:
    """The question with its slots filled in order. ValueError unless there is one value a slot."""
    slots = _SLOT.findall(question)
    if len(slots) != len(values) or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{len(slots)} slots in {question!r}, values {values!r}")
    rest = iter(values)
    filled = _SLOT.sub(lambda slot: next(rest), question)
    return " ".join(filled.replace("？", "?").split())  # noqa: RUF001 - some questions end in a wide ?


def parse_list(row: dict[str, Any], name: str) -> list[Any]:
    """A list that stands in a string, as `"[\\"Audio\\", \\"Counting\\"]"`."""
    value = row.get(name)
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is {value!r}, expected a list in a string") from error
    if not isinstance(value, list):
        raise ValueError(f"{name} is {value!r}, expected a list in a string")
    return value


def _sample(row: dict[str, Any], split: Split, folder: Folder, videos: Path) -> Sample:
    video, answer = field(row, "video_id"), field(row, "anser")
    kind = parse_list(row, "type")
    if len(kind) != 2 or not all(isinstance(part, str) for part in kind):
        raise ValueError(f"type is {kind!r}, expected modality and kind of question")
    question = fill(field(row, "question_content"), parse_list(row, "templ_values"))
    return Sample(
        id=f"music-avqa/{field(row, 'question_id')}",
        task="avqa",
        split=split,
        clip=video,
        video=folder.video(video, videos),
        instruction=avqa.instruction(question),
        answer=avqa.format_answer(answer),
        label={"answer": answer, "type": kind},
    )
