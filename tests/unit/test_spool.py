"""The spool on disk: whole records out, however the file was torn or its writer ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from crab_platform import spool as spool_module
from crab_platform.delivery import Delivery, deliver_folder
from crab_platform.mlflow_records import Refused
from crab_platform.spool import (
    Cursor,
    Record,
    Spool,
    frame,
    is_written,
    load_cursor,
    read,
    save_cursor,
    spools,
    unframe,
)

FIRST = {"op": "run", "uri": "http://nowhere", "time": 1, "id": "a"}


def metrics(step: int, **values: float) -> Record:
    return {"op": "metrics", "time": step, "step": step, "values": values or {"loss": 1.0}}


def found(path: Path, offset: int = 0) -> list[Record | None]:
    return [piece.record for piece in read(path, offset)]


def test_a_record_comes_back_and_a_changed_one_does_not() -> None:
    line = frame({"text": 'a "b"\n\u00e4', "nan": float("inf")})
    assert line.count(b"\n") == 1
    assert unframe(line) == {"text": 'a "b"\n\u00e4', "nan": float("inf")}
    for place in range(len(line) - 1):
        changed = line[:place] + bytes([line[place] ^ 1]) + line[place + 1 :]
        assert unframe(changed) is None
        assert unframe(line[:place]) is None


def test_a_spoiled_line_costs_itself_only_and_a_torn_tail_waits(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    for step in range(3):
        spool.append(metrics(step))
    spool.close()
    lines = spool.path.read_bytes().splitlines(keepends=True)
    spool.path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2] + lines[3][:-1])
    assert found(spool.path) == [FIRST, None, metrics(1)]
    end = [piece.end for piece in read(spool.path)][-1]
    with spool.path.open("ab") as file:
        file.write(b"\n")
    assert found(spool.path, end) == [metrics(2)]


def test_what_follows_a_short_write_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes half a record; when there is room again, the next one counts."""
    spool = Spool.create(tmp_path, FIRST)
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(
            spool_module.os, "write", lambda file, data: write(file, data[: len(data) // 2])
        )
        with pytest.raises(OSError, match="disk full"):
            spool.append(metrics(0))
    spool.append(metrics(1))
    assert found(spool.path) == [FIRST, None, metrics(1)]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)

    def work(first: int) -> None:
        for step in range(first, first + 200):
            spool.append(metrics(step))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found(spool.path)) == 801
    assert None not in found(spool.path)


LOOK = "import sys; from pathlib import Path; from crab_platform.spool import is_written; "


def test_others_see_whether_the_writer_lives(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    look = [sys.executable, "-c", LOOK + "print(is_written(Path(sys.argv[1])))", str(spool.path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def seen() -> str:
        return subprocess.run(look, env=env, capture_output=True, text=True, check=True).stdout

    assert seen() == "True\n"
    spool.close()
    assert seen() == "False\n"
    assert not is_written(spool.path)


def test_kept_files_outlive_what_they_were_made_from(tmp_path: Path) -> None:
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "deep" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    spool = Spool.create(tmp_path / "spool", FIRST)
    folder, file = spool.keep(tmp_path / "made"), spool.keep(tmp_path / "b.txt")
    (tmp_path / "made" / "deep" / "a.txt").unlink()
    (tmp_path / "b.txt").unlink()
    assert (folder / "deep" / "a.txt").read_text() == "a"
    assert file.read_text() == "b"
    assert (folder.name, file.name) == ("made", "b.txt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        spool.keep(tmp_path / "b.txt")


def test_without_links_the_path_itself_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_file_system(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a.txt").write_text("a")
    spool = Spool.create(tmp_path / "spool", FIRST)
    monkeypatch.setattr(spool_module.os, "link", other_file_system)
    assert spool.keep(tmp_path / "made") == tmp_path / "made"
    assert spool.keep(tmp_path / "made" / "a.txt") == tmp_path / "made" / "a.txt"


def test_a_cursor_is_there_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert load_cursor(path) == Cursor()
    save_cursor(path, Cursor(offset=7, run_id="r"))
    assert load_cursor(path) == Cursor(offset=7, run_id="r")
    for spoiled in ("", "{", '{"unknown": 1}'):
        path.with_suffix(".cursor").write_text(spoiled)
        assert load_cursor(path) == Cursor()


class Heard:
    """A target that remembers, refuses metrics named `bad`, and fails so many times before each success."""

    def __init__(self, failures: int = 0) -> None:
        self.run_id: str | None = "server's"
        self.heard: list[Record] = []
        self.batches: list[int] = []
        self._failures = self._left = failures

    def apply(self, records: Sequence[Record]) -> None:
        if self._left:
            self._left -= 1
            raise ConnectionError("no answer")
        self._left = self._failures
        if any("bad" in record.get("values", {}) for record in records):
            raise Refused("bad")
        self.heard += records
        self.batches.append(sum(len(record.get("values", {})) for record in records))


def test_metrics_go_together_in_the_order_of_the_records(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    records = [metrics(step, a=1.0, b=2.0) for step in range(1200)]
    for record in records:
        spool.append(record)
    spool.append({"op": "tag", "name": "a", "value": "b"})
    spool.append({"op": "end", "status": "FINISHED", "time": 9})
    spool.close()
    heard = Heard()
    assert Delivery(spool.path, lambda uri, run_id: heard).step()
    assert heard.heard[1:-2] == records
    assert heard.batches == [0, 1000, 1000, 400, 0, 0]


def test_a_refused_record_is_set_aside_and_its_neighbours_go(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    for record in (metrics(0), metrics(1, bad=1.0), metrics(2)):
        spool.append(record)
    spool.close()
    heard = Heard(failures=1)
    (outcome,) = deliver_folder(tmp_path, make=lambda uri, run_id: heard)
    assert [record["op"] for record in heard.heard] == ["run", "metrics", "metrics", "end"]
    assert heard.heard[-1] == {"op": "end", "status": "KILLED", "time": 2}
    assert (outcome.cursor.delivered, outcome.cursor.refused) == (3, 1)
    refused = spool.path.with_suffix(".refused").read_text()
    assert json.loads(refused) == {"why": "bad", "record": metrics(1, bad=1.0)}
    assert spools(tmp_path) == []


def test_a_delivery_that_was_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    spool.append(metrics(0))
    spool.close()
    asked: list[str | None] = []
    heard = Heard(failures=1)

    def make(uri: str, run_id: str | None) -> Heard:
        asked.append(run_id)
        return heard

    for _ in range(3):  # once before each record and before the word that its writer died
        with pytest.raises(ConnectionError):
            Delivery(spool.path, make).step()
    assert Delivery(spool.path, make).step()
    assert [record["op"] for record in heard.heard] == ["run", "metrics", "end"]
    assert asked == [None, None, "server's", "server's"]


def test_a_spool_without_its_first_line_is_told_of_and_left(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    spool.append(metrics(0))
    spool.close()
    spool.path.write_bytes(b"x" + spool.path.read_bytes())
    (outcome,) = deliver_folder(tmp_path, make=lambda uri, run_id: Heard())
    assert "first line is spoiled" in outcome.cursor.trouble
    assert spools(tmp_path) == [spool.path]


def test_a_dead_writer_ends_when_its_last_record_came(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path, FIRST)
    spool.append(metrics(5))
    heard = Heard()
    delivery = Delivery(spool.path, lambda uri, run_id: heard)
    while delivery.cursor.delivered < 2:
        delivery.step()
    spool.close()
    heard_later = Heard()
    assert Delivery(spool.path, lambda uri, run_id: heard_later).step()
    assert heard.heard[:2] == [FIRST, metrics(5)]
    assert [*heard.heard, *heard_later.heard][-1]["time"] == 5
