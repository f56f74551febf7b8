"""MLflow killed for a while, down all along, failing in every way, and a spool torn by kill -9 (C3, C4, C5, C7).

Real `mlflow server`s, real kills, and a proxy that spoils requests. Each check is also given a planted bug, which it
must find. The full profile is as long as the figures ask, and measures; the quick one is the same, shorter.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from servers.fault_proxy import Fault, Traffic, fault_proxy
from servers.mlflow_server import MlflowServer, mlflow_server
from servers.seaweedfs import free_ports
from support.spooled import (
    end_record,
    first_record,
    metrics_record,
    problems,
    runs,
    write_spool,
)
from support.tracked_job import KEYS

from crab_platform import delivery
from crab_platform.delivery import MakeTarget, Outcome, deliver_folder, to_mlflow
from crab_platform.mlflow_records import Records
from crab_platform.spool import FOLDER, Piece, Record, read, spools

P99_S = 0.001
EXIT_S = 10.0
FAULTS: tuple[Fault, ...] = ("lose", 429, 500, "reset", "truncate", "stall")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests here that do not kill it."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


class Job:
    """The job of support/tracked_job.py in a process of its own."""

    def __init__(self, uri: str, folder: Path, seconds: float, *more: str) -> None:
        self.folder = folder
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.tracked_job", uri, str(folder), str(seconds), *more],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout
        assert self._out.readline() == "begun\n"

    def kill_after(self, steps: int) -> list[int]:
        """kill -9 after so many steps; the steps that it had logged."""
        seen = [int(self._out.readline().split()[1]) for _ in range(steps)]
        self._process.kill()
        seen += [int(line.split()[1]) for line in self._out.read().split("\n")[:-1]]
        self._process.wait()
        return seen

    def end(self) -> dict[str, Any]:
        """What it said at last, its exit status, and how long it took from its end to its exit."""
        *steps, last = self._out.read().splitlines()
        rc = self._process.wait()
        said: dict[str, Any] = json.loads(last)
        return said | {
            "rc": rc,
            "exit_s": time.time() - said["ended"],
            "steps": [int(line.split()[1]) for line in steps],
        }


def replay(folder: Path, make: MakeTarget = to_mlflow) -> list[Outcome]:
    """As `crab replay` does; what is left is a failure."""
    place = folder / FOLDER
    outcomes = deliver_folder(place, make=make, give_up_s=60) if place.is_dir() else []
    assert [outcome.cursor.trouble for outcome in outcomes if outcome.path.exists()] == []
    return outcomes


def p99(calls: Sequence[Sequence[float]], begin: float, end: float) -> float:
    """Of the calls between two moments, in seconds."""
    took = [seconds for moment, seconds in calls if begin <= moment <= end]
    assert len(took) >= 100
    found = statistics.quantiles(took, n=100)[98]
    print(
        f"{len(took)} calls: median {statistics.median(took) * 1e6:.0f} us, p99 {found * 1e6:.0f} us, "
        f"slowest {max(took) * 1e3:.2f} ms"
    )
    return found


def outage(folder: Path, seconds: float, *more: str) -> tuple[list[str], dict[str, Any]]:
    """A run of which the server misses the middle third: (what is wrong afterwards, what the job said)."""
    with mlflow_server(folder / "server") as server:
        job = Job(server.url, folder / "run", seconds, *more)
        time.sleep(seconds / 3)
        server.kill()
        gone = time.time()
        time.sleep(seconds / 3)
        back = time.time()
        server.start()
        print(f"down for {back - gone:.0f} s, answers after {time.time() - gone:.0f} s")
        said = job.end()
        replay(folder / "run")
        found = problems(server.url, said["steps"], keys=KEYS, files=["note.txt", "spec.yaml"])
    if said["rc"] or said["errors"]:
        found.append(f"exit status {said['rc']}, {said['errors']} exceptions")
    print(f"{len(said['steps'])} steps, exit after {said['exit_s']:.1f} s; {found}")
    return found, said | {"p99_s": p99(said["calls"], gone, back)}


def test_an_outage_costs_nothing_and_loses_nothing(tmp_path: Path) -> None:
    found, _ = outage(tmp_path, 12)
    assert found == []


@pytest.mark.faults
def test_an_outage_of_60_s_in_180_s(tmp_path: Path) -> None:
    found, said = outage(tmp_path, 180)
    assert found == []
    assert said["p99_s"] <= P99_S


@pytest.mark.faults
def test_a_loop_that_talks_to_the_server_is_caught(tmp_path: Path) -> None:
    found, said = outage(tmp_path, 30, "--how", "direct")
    assert any("exceptions" in problem for problem in found)
    assert any("lost" in problem for problem in found)
    assert said["p99_s"] > P99_S


@contextmanager
def nobody() -> Iterator[str]:
    """An address at which nobody listens."""
    (port,) = free_ports(1)
    yield f"http://127.0.0.1:{port}"


@contextmanager
def silence() -> Iterator[str]:
    """A server that takes every request and says nothing."""
    with nobody() as behind, fault_proxy(behind, lambda method, path: "stall") as url:
        yield url


Down = Callable[[], Any]


def down_all_along(down: Down, folder: Path, server: MlflowServer, *more: str) -> list[str]:
    """A whole run without a server, then a replay with one."""
    with down() as url:
        said = Job(url, folder / "run", 3, *more).end()
    (spool,) = spools(folder / "run" / FOLDER)
    # The server comes back under its name; here it cannot have the port of the dead one.
    text = spool.read_bytes()
    steps = sum(
        piece.record is not None and piece.record["op"] == "metrics" for piece in read(spool)
    )
    found = [] if steps == len(said["steps"]) else [f"{steps} of {len(said['steps'])} in the spool"]
    if said["rc"] or said["errors"]:
        found.append(f"exit status {said['rc']}, {said['errors']} exceptions")
    if said["exit_s"] > EXIT_S:
        found.append(f"exit {said['exit_s']:.0f} s after its end")
    assert url.encode() in text

    def to_the_server(uri: str, run_id: str | None) -> Records:
        assert uri == url
        return Records(server.url, run_id)

    replay(folder / "run", to_the_server)
    found += problems(
        server.url, said["steps"], keys=KEYS, local_id=said["run_id"], files=["note.txt"]
    )
    print(f"exit {said['exit_s']:.1f} s after its end; {found}")
    return found


@pytest.mark.parametrize("down", [nobody, silence])
def test_a_run_without_a_server_ends_in_time_and_is_delivered_later(
    down: Down, tmp_path: Path, server: MlflowServer
) -> None:
    assert down_all_along(down, tmp_path, server) == []


@pytest.mark.faults
def test_a_job_that_waits_for_the_server_is_caught(tmp_path: Path, server: MlflowServer) -> None:
    found = down_all_along(nobody, tmp_path, server, "--end-limit", "15")
    assert any("after its end" in problem for problem in found)


class Trouble:
    """Each kind of request meets all faults in turn, with an answer in between, `rounds` times."""

    def __init__(self, faults: Sequence[Fault], rounds: int) -> None:
        self._faults = [fault for one in faults for fault in (one, "pass")] * rounds
        self._seen = Counter[str]()

    def __call__(self, method: str, path: str) -> Fault:
        kind = f"{method} {'/'.join(urlsplit(path).path.split('/')[:6])}"
        number = self._seen[kind]
        self._seen[kind] += 1
        return self._faults[number] if number < len(self._faults) else "pass"


STEPS = 40


def records(uri: str, local_id: str, note: Path) -> Iterator[Record]:
    """A run in which every kind of record comes several times, metrics between them."""
    yield first_record(uri, local_id)
    yield {"op": "params", "values": {"a": "1"}}
    for step in range(STEPS):
        yield metrics_record(step)
        if step % 3 == 0:
            yield {"op": "tag", "name": "at", "value": str(step)}
    for number in range(3):
        yield {"op": "dataset", "name": "clips", "digest": "a1" * 32, "url": f"s3://b/{number}"}
        yield {"op": "file", "path": str(note), "folder": None}
    yield end_record()


def trouble(
    server: MlflowServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: MakeTarget = to_mlflow,
    faults: Sequence[Fault] = FAULTS,
    rounds: int = 3,
) -> tuple[list[str], Traffic]:
    """Deliver a run through the proxy: (what is wrong afterwards, what was asked)."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE_S", 0.2)
    note = folder / "note.txt"
    folder.mkdir(exist_ok=True)
    note.write_text("x")
    local_id = uuid.uuid4().hex
    traffic = Traffic()
    with fault_proxy(server.url, Trouble(faults, rounds), traffic) as url:
        path = write_spool(folder / FOLDER, list(records(url, local_id, note)))
        (outcome,) = replay(folder, make)
    found = problems(server.url, range(STEPS), local_id=local_id, files=["note.txt"])
    refused = path.with_suffix(".refused")
    if outcome.cursor.refused:
        found.append(f"{outcome.cursor.refused} refused: {refused.read_text()}")
    print(f"{len(traffic.requests)} requests, {traffic.faults()}; {found}")
    return found, traffic


def test_refusals_silence_and_lost_answers_cost_nothing(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, traffic = trouble(server, tmp_path, monkeypatch)
    assert found == []
    assert all(traffic.faults()[str(fault)] for fault in FAULTS)


class TwiceIsTwice(Records):
    """Planted bug: never asks what has arrived, and stamps what it sends when it sends it."""

    def steps(self, key: str) -> set[int]:
        return set()

    def log(self, metrics: Sequence[Metric]) -> None:
        now = time.time_ns() // 1_000_000
        super().log([Metric(m.key, m.value, now, m.step) for m in metrics])


class NeverLooks(Records):
    """Planted bug: a run whose creation had no answer is created again."""

    def created(self, experiment: str, local_id: str) -> None:
        return None


class Hopes(Records):
    """Planted bug: what was sent has arrived."""

    def apply(self, records: Sequence[Record]) -> None:
        try:
            super().apply(records)
        except MlflowException:
            if records[0]["op"] == "run":
                raise


@pytest.mark.parametrize(
    ("planted", "faults", "symptom"),
    [
        (TwiceIsTwice, ["lose"], "doubled"),
        (NeverLooks, ["lose"], "2 runs"),
        (Hopes, [429], "lost"),
        (Hopes, [500], "lost"),
        (Hopes, ["reset"], "lost"),
    ],
)
def test_careless_deliveries_are_caught(
    server: MlflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: type[Records],
    faults: list[Fault],
    symptom: str,
) -> None:
    found, _ = trouble(server, tmp_path, monkeypatch, planted, faults)
    assert any(symptom in problem for problem in found)


@pytest.mark.faults
def test_180_s_with_60_s_of_all_kinds_of_trouble(server: MlflowServer, tmp_path: Path) -> None:
    """As an outage, but in the middle third the server answers wrongly, or not, or does it and says nothing."""
    phase: dict[str, Fault] = {"fault": "pass"}
    traffic = Traffic()
    with fault_proxy(server.url, lambda method, path: phase["fault"], traffic) as url:
        job = Job(url, tmp_path / "run", 180)
        time.sleep(60)
        began = time.time()
        for fault in FAULTS:
            phase["fault"] = fault
            time.sleep(60 / len(FAULTS))
        ended = time.time()
        phase["fault"] = "pass"
        said = job.end()
        replay(tmp_path / "run")
    (run,) = [run for run in runs(server.url) if said["run_id"] in _names(run)]
    local_id = run.data.tags["crab.run"]
    found = problems(server.url, said["steps"], keys=KEYS, files=["note.txt"], local_id=local_id)
    print(f"{len(said['steps'])} steps, {traffic.faults()}; {found}")
    assert all(traffic.faults()[str(fault)] for fault in FAULTS)
    assert found == []
    assert (said["rc"], said["errors"]) == (0, 0)
    assert p99(said["calls"], began, ended) <= P99_S


def _names(run: Any) -> list[str]:
    return [run.info.run_id, *run.data.tags["crab.run"].split()]


def torn_at(
    folder: Path, uri: str, chance: random.Random, num: int
) -> Iterator[tuple[str, Path, Collection[int]]]:
    """Spools cut at random offsets: (id, folder, the steps whose lines are whole)."""
    for number in range(num):
        local_id = uuid.uuid4().hex
        place = folder / str(number) / FOLDER
        path = write_spool(place, [first_record(uri, local_id), *map(metrics_record, range(30))])
        whole = path.read_bytes()
        begin = whole.index(b"\n") + 1  # the first line has its name only when it is whole
        cut = chance.randrange(begin, len(whole))
        path.write_bytes(whole[:cut])
        yield local_id, folder / str(number), range(whole[:cut].count(b"\n") - 1)


def torn(
    uri: str, cases: Collection[tuple[str, Path, Collection[int]]], *, give_up_s: float = 60
) -> list[str]:
    """What is wrong after the delivery of torn spools, crashes among it."""
    found = []
    for local_id, folder, steps in cases:
        (outcome,) = deliver_folder(folder / FOLDER, give_up_s=give_up_s)
        if outcome.path.exists():
            found.append(f"crash: {outcome.cursor.trouble}")
        found += problems(uri, steps, status="KILLED", local_id=local_id)
    return found


def test_a_torn_spool_gives_all_its_whole_records(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cases = list(torn_at(tmp_path, uri, random.Random(1), 25))
    assert torn(uri, cases) == []


@pytest.mark.faults
def test_spools_torn_at_100_random_offsets(tmp_path: Path, server: MlflowServer) -> None:
    cases = list(torn_at(tmp_path, server.url, random.Random(2), 100))
    print(f"{sum(len(steps) for _, _, steps in cases)} whole records")
    assert torn(server.url, cases) == []


@pytest.mark.faults
def test_writers_killed_100_times_in_the_middle_of_a_line(
    tmp_path: Path, server: MlflowServer
) -> None:
    """kill -9 of real writers, which write a few bytes at a time; the steps that they had told of are the truth."""
    chance = random.Random(3)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    cases = []
    num_torn = 0
    for number in range(100):
        local_id = uuid.uuid4().hex
        place = tmp_path / str(number) / FOLDER
        writer = subprocess.Popen(
            [sys.executable, "-m", "support.torn_writer", str(place), server.url, local_id],
            stdout=subprocess.PIPE,
            env=env,
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.random() * 0.3)
        writer.kill()
        told = 1 + writer.stdout.read().count(b"\n")
        writer.wait()
        (path,) = spools(place)
        lines = path.read_bytes().split(b"\n")
        num_torn += bool(lines[-1])
        # Killed between a whole record and the word of it, there is one more.
        assert len(lines) - 2 - told in (0, 1)
        cases.append((local_id, tmp_path / str(number), range(len(lines) - 2)))
    print(f"{num_torn} of 100 torn, {sum(len(steps) for _, _, steps in cases)} whole records")
    assert num_torn >= 50
    assert torn(server.url, cases) == []


def trusting(path: Path, offset: int = 0) -> Iterator[Piece]:
    """Planted bug: every line is a record."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            yield Piece(record=json.loads(line.split(b" ", 2)[2]), end=offset)


def all_or_nothing(path: Path, offset: int = 0) -> Iterator[Piece]:
    """Planted bug: a torn file is of no use."""
    if not path.read_bytes().endswith(b"\n"):
        return iter(list(read(path))[:1] if not offset else [])
    return read(path, offset)


@pytest.mark.parametrize(("planted", "symptom"), [(trusting, "crash"), (all_or_nothing, "lost")])
def test_careless_readers_are_caught(
    planted: Callable[..., Iterator[Piece]],
    symptom: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cases = list(torn_at(tmp_path, uri, random.Random(4), 5))
    monkeypatch.setattr(delivery, "read", planted)
    assert any(symptom in problem for problem in torn(uri, cases, give_up_s=0))


def killed_and_resumed(
    server: MlflowServer, folder: Path, make: MakeTarget = to_mlflow
) -> list[str]:
    """Attempt one is killed at step 20, attempt two goes on from its checkpoint at step 12, elsewhere."""
    identity = uuid.uuid4().hex
    ids = [uuid.uuid4().hex for _ in range(2)]
    spoolings = [
        [metrics_record(step) for step in range(20)],
        [*(metrics_record(step, attempt=1) for step in range(12, 40)), end_record()],
    ]
    for local_id, spooled in zip(ids, spoolings, strict=True):
        place = folder / local_id
        write_spool(place / FOLDER, [first_record(server.url, local_id, resume=identity), *spooled])
        replay(place, make)
    found = problems(server.url, range(40), local_id=ids[0])
    return found + problems(server.url, range(40), local_id=ids[1])


def test_a_killed_run_goes_on_in_the_same_run(server: MlflowServer, tmp_path: Path) -> None:
    assert killed_and_resumed(server, tmp_path) == []


class NeverAsks(Records):
    """Planted bug: what an earlier process has logged is logged again."""

    def steps(self, key: str) -> set[int]:
        return self._steps.setdefault(key, set())


class StartsAnew(Records):
    """Planted bug: a resumed job makes a run of its own."""

    def _begin(self, record: Record) -> None:
        super()._begin({**record, "resume": None})


@pytest.mark.parametrize(("planted", "symptom"), [(NeverAsks, "doubled"), (StartsAnew, "lost")])
def test_careless_resumptions_are_caught(
    server: MlflowServer, tmp_path: Path, planted: type[Records], symptom: str
) -> None:
    assert any(symptom in problem for problem in killed_and_resumed(server, tmp_path, planted))


@pytest.mark.parametrize("up", [True, False], ids=["server up", "server down"])
def test_a_job_killed_with_kill_9_loses_nothing(
    tmp_path: Path, server: MlflowServer, up: bool
) -> None:
    """The same job, started again in the same folder, first brings what the killed one has left."""
    identity = uuid.uuid4().hex
    phase: dict[str, Fault] = {"fault": "pass"}
    with fault_proxy(server.url, lambda method, path: phase["fault"]) as url:
        job = Job(url, tmp_path / "run", 600, "--resume", identity)
        (spool,) = spools(tmp_path / "run" / FOLDER)
        phase["fault"] = "pass" if up else "reset"
        first = job.kill_after(50)
        if up:  # what goes with it brings the rest and says what became of the run
            while spool.exists():
                time.sleep(0.1)
            assert [run.info.status for run in runs(server.url) if _is(run, identity)] == ["KILLED"]
        phase["fault"] = "pass"
        last = Job(url, tmp_path / "run", 2, "--resume", identity, "--first", "30").end()
    replay(tmp_path / "run")
    (run,) = [run for run in runs(server.url) if _is(run, identity)]
    ids = run.data.tags["crab.run"].split()
    assert len(ids) == 2
    every = sorted({*first, *last["steps"]})
    assert every == list(range(len(every)))
    assert problems(server.url, every, keys=KEYS, local_id=ids[0], files=["note.txt"]) == []


def _is(run: Any, identity: str) -> bool:
    return bool(run.data.tags.get("identity") == identity)


def test_a_server_that_refuses_one_record_gets_the_others(
    server: MlflowServer, tmp_path: Path
) -> None:
    local_id = uuid.uuid4().hex
    bad = metrics_record(1, key="not; a name")
    gone = {"op": "file", "path": str(tmp_path / "gone"), "folder": None}
    spooled = [metrics_record(0), bad, gone, metrics_record(2), end_record()]
    path = write_spool(tmp_path / FOLDER, [first_record(server.url, local_id), *spooled])
    (outcome,) = replay(tmp_path)
    assert outcome.cursor.refused == 2
    refused = path.with_suffix(".refused").read_text().splitlines()
    assert [json.loads(line)["record"] for line in refused] == [bad, gone]
    assert problems(server.url, [0, 2], local_id=local_id) == []


def test_two_who_deliver_the_same_folder_do_not_meet(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    write_spool(tmp_path / FOLDER, [first_record(uri, "a"), end_record()])
    with delivery.delivering(tmp_path / FOLDER, wait=False) as mine:
        assert mine
        assert deliver_folder(tmp_path / FOLDER) == []
    assert len(deliver_folder(tmp_path / FOLDER)) == 1
