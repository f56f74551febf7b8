"""Rows of annotation files, one at a time, each with its line.

A byte order mark and Windows line ends are read over. What breaks a file (a quote that is never closed, text that is no
JSON) is reported with its line and ends that file; a row with bytes that are not UTF-8 is reported by itself.

JSON lists are cut into entries by the standard library's own `raw_decode` on a sliding window: it is as fast as a
streaming parser and, unlike ijson 3.6, knows the line on which an entry begins, which is what a person needs.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crab.datasets.folder import Folder
from crab.datasets.report import Origin, Report

_WINDOW = 1 << 20
"Characters read at a time."

_LARGEST_ENTRY = 1 << 24
"An entry of a JSON list that is still not complete after so many characters is broken."

_SPOILT = "�"
"What stands for bytes that are not UTF-8."

Row = tuple[Origin, dict[str, Any]]


def field(row: dict[str, Any], name: str) -> str:
    """The text of a field; ValueError where it is not there or blank, or NaN, which pandas writes for blank cells."""
    value = row.get(name)
    if (
        not isinstance(value, str | int | float)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
        or not str(value).strip()
    ):
        raise ValueError(f"{name} is {value!r}, expected text")
    return str(value).strip()


def whole(row: dict[str, Any], name: str) -> int:
    """A field as a whole number; ValueError naming the field otherwise. `3` and `3.0` are whole."""
    text = field(row, name)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"{name} is {text!r}, expected a whole number")
    return int(number)


def separated_rows(
    folder: Folder, path: Path, report: Report, columns: Sequence[str], separator: str
) -> Iterator[Row]:
    """Rows of a file without quotes and without a header, such as AVE's. Blank lines are skipped."""
    name = folder.relative(path)
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = Origin(file=name, line=number)
            if not report.take(name):
                return
            cells = line.strip().split(separator)
            if _fits(cells, columns, origin, report):
                yield origin, dict(zip(columns, cells, strict=True))


def csv_rows(
    folder: Folder, path: Path, report: Report, columns: Sequence[str], delimiter: str = ","
) -> Iterator[Row]:
    """Rows of a CSV file with a header, by column name.

    ValueError where the header lacks one of `columns`: then it is another data set's file.
    """
    name = folder.relative(path)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        header = [cell.strip() for cell in next(reader, [])]
        if missing := [column for column in columns if column not in header]:
            raise ValueError(
                f"{path}: columns {', '.join(header) or 'none'}; {', '.join(missing)} expected too"
            )
        start = reader.line_num + 1
        while True:
            origin = Origin(file=name, line=start)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                report.set_aside(origin, f"the file cannot be read from here on: {error}")
                return
            end, start = reader.line_num, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not report.take(name):
                return
            if end > origin.line and any("\n" in cell for cell in cells):
                reason = (
                    f"a quote opens here and closes in line {end}; the lines between are no rows"
                )
                report.set_aside(origin, reason)
            elif _fits(cells, header, origin, report):
                yield origin, dict(zip(header, cells, strict=True))


def json_rows(folder: Folder, path: Path, report: Report) -> Iterator[Row]:
    """Objects of a JSON list, or of a file with one JSON object a line."""
    name = folder.relative(path)
    for line, entry in _json_entries(path):
        origin = Origin(file=name, line=line)
        if isinstance(entry, _Broken):
            report.set_aside(origin, f"the file cannot be read from here on: {entry.reason}")
            return
        if not report.take(name):
            return
        if not isinstance(entry, dict):
            report.set_aside(
                origin, f"{type(entry).__name__} given, expected an object with fields"
            )
        elif _SPOILT in json.dumps(entry, ensure_ascii=False):
            report.set_aside(origin, "holds bytes that are not UTF-8")
        else:
            yield origin, entry


class _Broken:
    def __init__(self, reason: str) -> None:
        self.reason = reason


def _json_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, entry) of a list, or of a sequence of values with nothing but blanks between them; _Broken at the end of
    what could be read."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig", errors="replace") as source:
        text, at, line = source.read(_WINDOW), 0, 1
        at, line = _skip(text, at, line, " \t\r\n")
        is_list = text[at : at + 1] == "["
        at += is_list
        between = " \t\r\n," if is_list else " \t\r\n"
        while True:
            at, line = _skip(text, at, line, between)
            if at == len(text):
                text, at = source.read(_WINDOW), 0
                if text:
                    continue
                if is_list:
                    yield line, _Broken("the list is never closed: is the file cut off?")
                return
            if is_list and text[at] == "]":
                return
            try:
                entry, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                reason: str | None = (
                    f"{error.msg}, line {line + text.count(chr(10), at, error.pos)}"
                )
                end = len(text)
            else:
                reason = None
            if end == len(text) and (more := source.read(_WINDOW)):
                # The entry may go on in what was not read yet.
                text, at = text[at:] + more, 0
                if len(text) <= _LARGEST_ENTRY:
                    continue
            if reason is not None:
                yield line, _Broken(reason)
                return
            yield line, entry
            line += text.count("\n", at, end)
            at = end


def _skip(text: str, at: int, line: int, blanks: str) -> tuple[int, int]:
    start = at
    while at < len(text) and text[at] in blanks:
        at += 1
    return at, line + text.count("\n", start, at)


def _fits(cells: Sequence[str], columns: Sequence[str], origin: Origin, report: Report) -> bool:
    if len(cells) != len(columns):
        report.set_aside(
            origin, f"{len(cells)} fields, expected {len(columns)}: {', '.join(columns)}"
        )
        return False
    if any(_SPOILT in cell for cell in cells):
        report.set_aside(origin, "holds bytes that are not UTF-8")
        return False
    return True
