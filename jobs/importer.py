"""`crab import SOURCE DIR OUT`: an official data set on disk becomes OUT/samples.jsonl.

Rows stream from the annotation files through a reader of `crab.datasets` to the file, so memory holds ids and the list
of the folder's files, never all samples. OUT holds

    samples.jsonl     written under a temporary name and renamed at the end; media and masks by absolute path
    problems.jsonl    a row a line that became no sample: file, line, kind (problem, left_out, duplicate), reason
    import.json       source and folder, written first; then the counts

Nothing is overwritten without a word: an OUT whose samples come from elsewhere is refused; the same import again
replaces them and says so. A sample is written only if its task can read its answer.
"""

from __future__ import annotations

import difflib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from crab.datasets import SOURCES
from crab.datasets.folder import Folder
from crab.datasets.report import Found, Origin, Report
from crab.samples import Sample
from crab.tasks import TASKS

IMPORT_VERSION = 2
"""Raise it when the same files may give other samples."""


def import_dataset(
    source: str, folder: Path, out: Path, limit: int | None = None
) -> dict[str, Any]:
    """Write OUT and return what was counted: the record of import.json.

    `limit` reads so many rows of each annotation file, to try it. Keys of the result:
    rows, samples           read and written
    problems, left_out, duplicates          entries of problems.jsonl by kind
    covered                 weak rows of clips that have exact labels
    missing_media, missing_masks            samples that need a file which is not there
    files                   annotation file -> {rows, set_aside}
    table                   by split and task: rows (that gave samples), samples, weak, missing_media, missing_masks
    notes, replaced, seconds

    Raises ValueError for an unknown source, or where OUT holds other samples or the annotations are another data set's;
    FileNotFoundError where the folder or its annotation files are not there.
    """
    if source not in SOURCES:
        near = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown source {source!r}, known are {', '.join(SOURCES)}{hint}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} given, expected 1 or more")
    begin = time.monotonic()
    files = Folder(folder)
    claim = {"version": IMPORT_VERSION, "source": source, "folder": str(files.root)}
    replaced = _claim(out, claim)
    _sweep(out)
    with (
        _Replacing(out / "problems.jsonl") as problems,
        _Replacing(out / "samples.jsonl") as rows,
    ):
        report = Report(
            write=lambda row: _write_line(problems, json.dumps(row, ensure_ascii=False)),
            limit=limit,
        )
        tally = _Tally(files)
        found = _checked(SOURCES[source](files, report), report)
        for origin, sample in tqdm(found, unit="sample", desc=source, disable=None):
            tally.add(origin, sample)
            _write_line(rows, sample.model_dump_json(exclude_none=True))
    if tally.missing_masks:
        report.note(
            f"{tally.missing_masks} samples have masks that are not there: they cannot be scored"
        )
    result = claim | {
        "out": str(out / "samples.jsonl"),
        "rows": sum(report.rows.values()),
        "samples": tally.samples,
        "problems": report.counts["problem"],
        "left_out": report.counts["left_out"],
        "duplicates": report.counts["duplicate"],
        "covered": report.counts["covered"],
        "missing_media": tally.missing_media,
        "missing_masks": tally.missing_masks,
        "files": {
            file: {"rows": count, "set_aside": report.aside[file]}
            for file, count in report.rows.items()
        },
        "table": tally.table(),
        "notes": report.notes,
        "replaced": replaced,
        "seconds": round(time.monotonic() - begin, 2),
    }
    _write_record(out / "import.json", result)
    return result


def _checked(found: Iterator[Found], report: Report) -> Iterator[Found]:
    """Lets through what can be read back: an id that is new, and an answer that the task parses or a weak label."""
    seen: set[str] = set()
    for origin, sample in found:
        if sample.id in seen:
            report.set_aside(origin, f"id {sample.id} was used before", "duplicate")
            continue
        seen.add(sample.id)
        if "weak" not in sample.label and TASKS[sample.task].parse(sample.answer) is None:
            report.set_aside(origin, f"task {sample.task} cannot read the answer {sample.answer!r}")
            continue
        yield origin, sample


class _Tally:
    """Counts by split and task."""

    def __init__(self, files: Folder) -> None:
        self._files = files
        self._last: dict[tuple[str, str], Origin] = {}
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        self.samples = self.missing_media = self.missing_masks = 0

    def add(self, origin: Origin, sample: Sample) -> None:
        key = (sample.split, sample.task)
        counts = self._counts.setdefault(key, Counter())
        # Samples of one row come one after the other.
        counts["rows"] += self._last.get(key) != origin
        self._last[key] = origin
        no_media = not all(self._files.has(path) for path, _ in sample.media())
        no_masks = not all(self._files.has(mask.file) for mask in sample.masks)
        counts["samples"] += 1
        counts["weak"] += "weak" in sample.label
        counts["missing_media"] += no_media
        counts["missing_masks"] += no_masks
        self.samples += 1
        self.missing_media += no_media
        self.missing_masks += no_masks

    def table(self) -> list[dict[str, str | int]]:
        order = ("train", "val", "test")
        names = ("rows", "samples", "weak", "missing_media", "missing_masks")
        return [
            {"split": split, "task": task} | {name: counts[name] for name in names}
            for (split, task), counts in sorted(
                self._counts.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
            )
        ]


class _Replacing:
    """A text file that takes its place when the block ends well, and is gone otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> IO[str]:
        self._file = self._temporary.open("w", encoding="utf-8")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _write_line(file: IO[str], line: str) -> None:
    file.write(line + "\n")


def _write_record(path: Path, record: dict[str, Any]) -> None:
    with _Replacing(path) as file:
        json.dump(record, file, indent=2, ensure_ascii=False)


def _claim(out: Path, claim: dict[str, Any]) -> bool:
    """Says in import.json what OUT will hold; True where it held the same import's samples before.

    ValueError where it holds samples of another origin.
    """
    record, samples = out / "import.json", out / "samples.jsonl"
    if samples.exists():
        if not record.exists():
            raise ValueError(
                f"{samples} exists and is of no import; choose another OUT, or move it away"
            )
        held = json.loads(record.read_text(encoding="utf-8"))
        for name in ("source", "folder"):
            if held.get(name) != claim[name]:
                raise ValueError(
                    f"{samples} is an import of {held.get('source')} from {held.get('folder')},"
                    f" and {claim['source']} from {claim['folder']} is asked; choose another OUT, or delete it"
                )
        return True
    out.mkdir(parents=True, exist_ok=True)
    _write_record(record, claim)
    return False


def _sweep(out: Path) -> None:
    """Delete half-written files of imports that were killed."""
    for leftover in out.glob(".*.json*.*.tmp"):
        owner = leftover.name.split(".")[-2]
        if owner.isdigit() and not Path("/proc", owner).exists():
            leftover.unlink(missing_ok=True)
