"""AVE: 4143 clips of 10 s with one event that is both seen and heard (YapengTian/AVE-ECCV18).

`Annotations.txt` has a clip a line, `Category&YouTubeID&Quality&Start&End`; `trainSet.txt`, `valSet.txt` and
`testSet.txt` of the AVE_Dataset archive have the same lines, by split. The repository itself gives the split only as
HDF5 indices into its own features, which are not read: without the three files every clip goes to train, since
`Annotations.txt` does not say which clips are the test set. One official line has the span 0,0: a clip of background
alone, and so it is labelled.
"""

from collections.abc import Iterator
from pathlib import Path

from crab.datasets.folder import Folder
from crab.datasets.report import Found, Ids, Origin, Report
from crab.datasets.rows import field, separated_rows, whole
from crab.samples import Sample, Split
from crab.tasks import ave
from crab.tasks.spans import NUM_SECONDS

COLUMNS = ("category", "youtube_id", "quality", "start", "end")
SPLIT_FILES: dict[Split, str] = {
    "train": "trainSet.txt",
    "val": "valSet.txt",
    "test": "testSet.txt",
}

_Event = tuple[str, str, int, int]
"category, YouTube id, start, end"


def read(folder: Folder, report: Report) -> Iterator[Found]:
    """FileNotFoundError without `Annotations.txt`."""
    path = folder.annotation("Annotations.txt")
    if path is None:
        raise FileNotFoundError(f"no Annotations.txt below {folder.root}")
    splits = _splits(folder, report)
    ids = Ids()
    seen: dict[_Event, int] = {}
    for origin, row in separated_rows(folder, path, report, COLUMNS, "&"):
        if origin.line == 1 and row["category"] == "Category":
            report.rows[origin.file] -= 1
            continue
        try:
            event = _event(row)
            if event in seen:
                report.set_aside(origin, f"the same as line {seen[event]}", "duplicate")
                continue
            seen[event] = origin.line
            split = splits.get(event) if splits else "train"
            if split is None:
                raise ValueError("in none of the split files")
            yield origin, _sample(event, split, ids, folder, path.parent / "AVE")
        except ValueError as error:
            report.set_aside(origin, str(error))
    if report.limit is None and (unread := len(splits.keys() - seen.keys())):
        report.note(f"{unread} events of the split files stand not in {path.name}: not imported")


def _event(row: dict[str, str]) -> _Event:
    category, youtube_id = field(row, "category"), field(row, "youtube_id")
    start, end = whole(row, "start"), whole(row, "end")
    if start == end == 0:
        return ave.BACKGROUND, youtube_id, 0, NUM_SECONDS
    if not 0 <= start < end <= NUM_SECONDS:
        raise ValueError(
            f"span {start},{end} given, expected 0 <= start < end <= {NUM_SECONDS} seconds"
        )
    return category, youtube_id, start, end


def _splits(folder: Folder, report: Report) -> dict[_Event, Split]:
    """Split of each event; empty where there are no split files."""
    splits: dict[_Event, Split] = {}
    found = {split: folder.annotation(name) for split, name in SPLIT_FILES.items()}
    missing = [SPLIT_FILES[split] for split, path in found.items() if path is None]
    if len(missing) == len(found):
        report.note(f"no {', '.join(missing)} below the folder: all clips went to train")
        return {}
    if missing:
        report.note(f"no {', '.join(missing)} below the folder: their clips are set aside")
    # Lines that do not fit stand in Annotations.txt too, and are reported from there.
    silent = Report(write=lambda row: None)
    for split, path in found.items():
        rows: Iterator[tuple[Origin, dict[str, str]]] = (
            separated_rows(folder, path, silent, COLUMNS, "&") if path else iter(())
        )
        for _, row in rows:
            try:
                splits[_event(row)] = split
            except ValueError:
                continue
    return splits


def _sample(event: _Event, split: Split, ids: Ids, folder: Folder, videos: Path) -> Sample:
    category, youtube_id, start, end = event
    return Sample(
        id=ids.take(f"ave/{youtube_id}"),
        task="ave",
        split=split,
        clip=youtube_id,
        video=folder.video(youtube_id, videos),
        instruction=ave.INSTRUCTION,
        answer=ave.format_answer(category, start, end),
        label={"event": category, "start_s": start, "end_s": end},
    )
