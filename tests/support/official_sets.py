"""Small and complete-size stand-ins for official annotation files: their formats and sizes, none of their content."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab.datasets import SOURCES
from crab.datasets.folder import Folder
from crab.datasets.llp import CLASSES
from crab.datasets.report import Report
from crab.samples import Sample

Problem = dict[str, str | int]


def read_source(source: str, folder: Path) -> tuple[list[Sample], list[Problem], Report]:
    """Samples, rows set aside, and the report of one reader."""
    problems: list[Problem] = []
    report = Report(write=problems.append)
    samples = [sample for _, sample in SOURCES[source](Folder(folder), report)]
    return samples, problems, report


def write_text(path: Path, *lines: str, newline: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + newline for line in lines).encode())
    return path


def write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ","
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))
    return path


def write_map(
    path: Path, pixels: Sequence[tuple[int, int, int, int, int]], size: int = 448
) -> None:
    """An index map of size x size with boxes (value, x1, y1, x2, y2), later ones on top."""
    values = np.zeros((size, size), np.uint8)
    for value, x1, y1, x2, y2 in pixels:
        values[y1:y2, x1:x2] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def youtube_id(number: int) -> str:
    return f"{number:011d}"


def question(number: int, **other: Any) -> dict[str, Any]:
    """An entry of MUSIC-AVQA."""
    return {
        "video_id": f"{number % 9288:08d}",
        "question_id": number,
        "type": '["Audio-Visual", "Counting"]',
        "question_content": "How many sounding <Object> in the video？",  # noqa: RUF001 - as in the official file
        "templ_values": '["violin"]',
        "question_deleted": 0,
        "anser": "two",
    } | other


def write_complete(source: str, folder: Path) -> int:
    """The annotation files of one source in their official sizes; returns the number of rows."""
    if source == "ave":
        splits = {"trainSet.txt": 3339, "valSet.txt": 402, "testSet.txt": 402}
        lines = [f"Church bell&{youtube_id(n)}&good&{n % 8}&{n % 8 + 2}" for n in range(4143)]
        write_text(folder / "Annotations.txt", *lines)
        for name, count in splits.items():
            write_text(folder / name, *lines[:count])
            lines = lines[count:]
        return 4143
    if source == "llp":
        names = list(CLASSES)
        weak = [(f"{youtube_id(n)}_{n % 90}_{n % 90 + 10}", names[n % 25]) for n in range(11849)]
        for name, rows in {
            "AVVP_train.csv": weak[:10000],
            "AVVP_val_pd.csv": weak[10000:10649],
            "AVVP_test_pd.csv": weak[10649:],
        }.items():
            write_csv(folder / name, ["filename", "event_labels"], rows, "\t")
        exact = [(clip, n % 5, 5 + n % 6, name) for n, (clip, name) in enumerate(weak[10000:])]
        header = ["filename", "onset", "offset", "event_labels"]
        write_csv(folder / "AVVP_eval_audio.csv", header, exact * 2, "\t")
        write_csv(folder / "AVVP_eval_visual.csv", header, exact * 2, "\t")
        return len(weak) + 4 * len(exact)
    if source == "music-avqa":
        numbers = iter(range(45867))
        for split, count in {"train": 32170, "val": 4568, "test": 9129}.items():
            rows = [question(next(numbers)) for _ in range(count)]
            write_json(folder / "data" / "json_update" / f"avqa-{split}.json", rows)
        return 45867
    if source == "ref-avs":
        sizes = {"train": 14113, "val": 1349, "test_s": 2288, "test_u": 1656, "test_n": 1028}
        rows = [
            (video, f"{video}_cat_{n % 7}", split, n % 3, f"The object, sounding {n}")
            for split, count in sizes.items()
            for n in range(count)
            if (video := f"{split.replace('_', '')}{youtube_id(n // 7)}_0_10000")
        ]
        write_csv(folder / "metadata.csv", ["vid", "uid", "split", "fid", "exp"], rows)
        return len(rows)
    if source == "avsbench":
        parts = {"v1s": 4932, "v1m": 424, "v2": 7000}
        rows = [
            (
                youtube_id(n),
                f"{part}{youtube_id(n)}_0",
                0,
                n,
                "dog_cat",
                ("train", "test")[n % 5 == 0],
                part,
            )
            for part, count in parts.items()
            for n in range(count)
        ]
        header = ["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"]
        write_csv(folder / "metadata.csv", header, rows)
        return len(rows)
    assert source == "valor", source
    for split, count in {"train": 25000, "val": 3500, "test": 3500}.items():
        rows = [
            {"video_id": f"{split}{n}_0.000_10.000", "desc": f"A dog {n} barks."}
            for n in range(count)
        ]
        write_json(folder / f"desc_{split}.json", rows)
    return 32000
