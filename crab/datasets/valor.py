"""VALOR-32K: clips of 10 s with one caption each that tells what is seen and heard (TXH-mercury/VALOR).

`desc_train.json`, `desc_val.json`, `desc_test.json` have `video_id` and `desc`, as a list or as one object a line.
Captions of one clip in one split are the references of one sample; the first is its answer.
"""

from collections.abc import Iterator
from pathlib import Path

from crab.datasets.folder import Folder
from crab.datasets.report import Found, Origin, Report
from crab.datasets.rows import field, json_rows
from crab.samples import Sample, Split
from crab.tasks import TASKS

FILES: dict[Split, str] = {
    "train": "desc_train.json",
    "val": "desc_val.json",
    "test": "desc_test.json",
}


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError where none of the three files is there."""
    found = {split: folder.annotation(name) for split, name in FILES.items()}
    if not any(found.values()):
        raise FileNotFoundError(f"none of {', '.join(FILES.values())} below {folder.root}")
    for split, path in found.items():
        if path is None:
            report.note(f"no {FILES[split]} below the folder")
            continue
        captions: dict[str, list[tuple[Origin, str]]] = {}
        for origin, row in json_rows(folder, path, report):
            try:
                own = captions.setdefault(field(row, "video_id"), [])
                caption = plain(field(row, "desc"))
                if caption in [text for _, text in own]:
                    report.set_aside(origin, "a caption that its clip has already", "duplicate")
                else:
                    own.append((origin, caption))
            except ValueError as error:
                report.set_aside(origin, str(error))
        for video, own in captions.items():
            if own:
                texts = [text for _, text in own]
                yield own[0][0], sample(f"valor/{video}", video, split, folder, path.parent, texts)


def plain(caption: str) -> str:
    """A caption in single blanks. ValueError where it holds < or >, which mark tags."""
    if "<" in caption or ">" in caption:
        raise ValueError(f"caption {caption!r} holds < or >, which only tags may")
    return " ".join(caption.split())


def sample(
    name: str, video: str, split: Split, folder: Folder, data: Path, captions: list[str]
) -> Sample:
    return Sample(
        id=name,
        task="avcap",
        split=split,
        clip=video,
        video=folder.video(video, data / "raw_videos"),
        instruction=TASKS["avcap"].instruction(None),
        answer=captions[0],
        label={"captions": captions},
    )
