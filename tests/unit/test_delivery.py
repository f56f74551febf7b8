"""How long a failing server is tried, in a time that passes only while somebody waits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from crab_platform.clock import Clock
from crab_platform.delivery import deliver_folder
from crab_platform.spool import Record, Spool

LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"


class FakeClock(Clock):
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def random(self) -> float:
        return 1.0


class Failing:
    """A target that fails before each success so many times, each after a time; or silently waits for its limit."""

    def __init__(self, clock: FakeClock, failures: int, takes_s: float | None = 0.0) -> None:
        self.run_id: str | None = "r"
        self.limits: list[int] = []
        self._clock, self._failures, self._takes_s = clock, failures, takes_s
        self._left = failures

    def apply(self, records: Sequence[Record]) -> None:
        limit_s = int(os.environ[LIMIT])
        self.limits.append(limit_s)
        if self._left:
            self._left -= 1
            self._clock.sleep(limit_s if self._takes_s is None else self._takes_s)
            raise ConnectionError("no answer")
        self._left = self._failures


def spool_of(folder: Path, records: int) -> None:
    spool = Spool.create(folder, {"op": "run", "uri": "http://nowhere", "time": 1})
    for number in range(records):
        spool.append({"op": "tag", "name": "a", "value": str(number)})
    spool.close()


def test_a_dead_server_is_given_up(tmp_path: Path) -> None:
    clock = FakeClock()
    spool_of(tmp_path, 3)
    target = Failing(clock, 10**6)
    (outcome,) = deliver_folder(tmp_path, give_up_s=30, make=lambda *_: target, clock=clock)
    assert outcome.path.exists()
    assert outcome.cursor.trouble == "ConnectionError: no answer"
    assert 30 <= clock.now_s <= 36
    assert os.environ.get(LIMIT) is None


def test_a_server_that_fails_now_and_then_is_not_given_up(tmp_path: Path) -> None:
    clock = FakeClock()
    spool_of(tmp_path, 50)
    (outcome,) = deliver_folder(
        tmp_path, give_up_s=30, make=lambda *_: Failing(clock, 2), clock=clock
    )
    assert not outcome.path.exists()
    assert clock.now_s > 60


def test_limits_grow_for_the_silent_and_not_for_those_who_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    silent, refusing, fixed = (Failing(clock, 10**6, takes_s) for takes_s in (None, 0.0, None))
    for name, target in (("silent", silent), ("refusing", refusing)):
        spool_of(tmp_path / name, 1)
        deliver_folder(tmp_path / name, give_up_s=200, make=lambda *_, t=target: t, clock=clock)
    assert silent.limits[:6] == [5, 10, 20, 40, 60, 60]
    assert set(refusing.limits) == {5}
    monkeypatch.setenv(LIMIT, "7")
    spool_of(tmp_path / "fixed", 1)
    deliver_folder(tmp_path / "fixed", give_up_s=30, make=lambda *_: fixed, clock=clock)
    assert set(fixed.limits) == {7}
