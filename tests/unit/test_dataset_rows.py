"""Rows of annotation files: lines, encodings, and files that break."""

import json
from pathlib import Path

import pytest

from crab.datasets import rows
from crab.datasets.folder import Folder
from crab.datasets.report import Report

Read = tuple[list[tuple[int, dict]], list[dict]]


def json_of(path: Path, content: str | bytes) -> Read:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems: list[dict] = []
    report = Report(write=problems.append)
    found = rows.json_rows(Folder(path.parent), path, report)
    return [(origin.line, row) for origin, row in found], problems


def csv_of(path: Path, content: str | bytes) -> Read:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    problems: list[dict] = []
    report = Report(write=problems.append)
    found = rows.csv_rows(Folder(path.parent), path, report, ("a", "b"))
    return [(origin.line, row) for origin, row in found], problems


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("window", [3, 7, 64, 1 << 20])
def test_json_lists_are_read_whole_whatever_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, indent: int | None
) -> None:
    monkeypatch.setattr(rows, "_WINDOW", window)
    entries = [{"n": n, "text": 'a ] } "quoted" é\n', "list": [n, {"m": n}]} for n in range(20)]
    text = json.dumps(entries, indent=indent, ensure_ascii=False)
    found, problems = json_of(tmp_path / "x.json", text)
    assert [row for _, row in found] == entries
    assert not problems
    lines = text.split("\n")
    for line, row in found:
        place = " ".join(lines[line - 1 : line + 2])
        assert indent is None or f'"n": {row["n"]},' in place


def test_json_lines_and_marks_and_windows_line_ends(tmp_path: Path) -> None:
    found, problems = json_of(tmp_path / "x.json", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert [(line, row["a"]) for line, row in found] == [(1, 1), (3, 2)]
    assert not problems


def test_a_json_list_that_breaks_says_where_and_keeps_what_came_before(tmp_path: Path) -> None:
    found, problems = json_of(tmp_path / "x.json", '[\n{"a": 1},\n{"a": 2,\n"b" 3},\n{"a": 4}]')
    assert [row["a"] for _, row in found] == [1]
    assert (problems[0]["line"], "line 4" in problems[0]["reason"]) == (3, True)
    found, problems = json_of(tmp_path / "y.json", '[\n{"a": 1}')
    assert len(found) == 1
    assert "cut off" in problems[0]["reason"]


def test_entries_that_are_no_objects_are_set_aside_one_by_one(tmp_path: Path) -> None:
    found, problems = json_of(tmp_path / "x.json", '[{"a": 1},\n7,\n{"a": 3}]')
    assert [row["a"] for _, row in found] == [1, 3]
    assert [problem["line"] for problem in problems] == [2]


def test_csv_quotes_marks_and_windows_line_ends(tmp_path: Path) -> None:
    found, problems = csv_of(tmp_path / "x.csv", b'\xef\xbb\xbfa,b\r\n1,"x, ""y"""\r\n\r\n2,z\r\n')
    assert found == [(2, {"a": "1", "b": 'x, "y"'}), (4, {"a": "2", "b": "z"})]
    assert not problems


def test_csv_rows_that_do_not_fit_are_told_with_their_line(tmp_path: Path) -> None:
    found, problems = csv_of(tmp_path / "x.csv", b"a,b\n1\n2,\xff\n3,y\n")
    assert [line for line, _ in found] == [4]
    assert [problem["line"] for problem in problems] == [2, 3]
    assert "UTF-8" in problems[1]["reason"]


def test_an_open_quote_does_not_swallow_rows_in_silence(tmp_path: Path) -> None:
    found, problems = csv_of(tmp_path / "x.csv", 'a,b\n1,"open\n2,x\n3,y"\n4,z\n')
    assert [row["a"] for _, row in found] == ["4"]
    assert problems[0]["line"] == 2
    assert "line 4" in problems[0]["reason"]


def test_columns_of_another_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="columns a, c; b expected"):
        csv_of(tmp_path / "x.csv", "a,c\n1,2\n")


@pytest.mark.parametrize(("value", "expected"), [("3", 3), (3, 3), ("3.0", 3)])
def test_whole_numbers(value: object, expected: int) -> None:
    assert rows.whole({"n": value}, "n") == expected


@pytest.mark.parametrize("value", ["3.5", "x", "", None, True, "inf", "nan", float("inf")])
def test_what_is_no_whole_number(value: object) -> None:
    with pytest.raises(ValueError, match="n is"):
        rows.whole({"n": value}, "n")


def test_nan_is_no_text(tmp_path: Path) -> None:
    ((_, row),), _ = json_of(tmp_path / "x.json", '[{"a_obj": NaN, "uid": "a"}]')
    with pytest.raises(ValueError, match="a_obj is nan"):
        rows.field(row, "a_obj")
