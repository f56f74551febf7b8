"""B11: the store of the checkpoints is away for a minute while one is written.

Training does not wait, and there is never a marker without its data.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

import pytest
from servers.fault_proxy import Fault, Traffic, fault_proxy
from servers.seaweedfs import S3Server
from support.tiny_training import Plan, Run, run, write_llm

from crab_platform import checkpoint
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.faults]

AWAY_S = 60
EVERY, STEPS = 10, 160


class Outage:
    """What the proxy does: nothing, or 503 to all that touches checkpoints, from the write of the second one on."""

    def __init__(self, away_s: float) -> None:
        self._away_s = away_s
        self._writes = 0
        self.began: float | None = None

    def spoil(self, method: str, path: str) -> Fault:
        if "/checkpoint_" not in path:
            return "pass"
        if method == "PUT" and self.began is None:
            self._writes += 1
            if (
                self._writes == 3
            ):  # the data of the second checkpoint: the first has data and marker
                self.began = time.monotonic()
        return 503 if self.is_on(time.monotonic()) else "pass"

    def is_on(self, at: float) -> bool:
        return self.began is not None and self.began <= at < self.began + self._away_s


@contextmanager
def away(s3: S3Server, monkeypatch: pytest.MonkeyPatch, outage: Outage) -> Iterator[Traffic]:
    traffic = Traffic()
    with fault_proxy(s3.endpoint, outage.spoil, traffic) as endpoint:
        for name, value in replace(s3, endpoint=endpoint).env().items():
            monkeypatch.setenv(name, value)
        yield traffic


def train_through(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sync: bool
) -> tuple[Run, Outage, list[float]]:
    """A run that lasts for longer than the outage, and when its steps arrived."""
    outage = Outage(AWAY_S)
    at: list[float] = []
    # Asleep for so long in each that even steps that take no time at all last for longer than the outage.
    step_s = 1.2 * AWAY_S / (STEPS - 2 * EVERY)
    with away(s3, monkeypatch, outage), connected(num_cpus=3):
        plan = Plan(
            llm=write_llm(tmp_path / "llm"),
            out=str(tmp_path),
            steps=STEPS,
            step_s=step_s,
            waits_for_checkpoints=sync,
        )
        seen = run(
            plan,
            on_step=lambda _step: at.append(time.monotonic()),
            checkpoint_every=EVERY,
            keep_checkpoints=100,
            num_workers=1,
            micro_batches=2,
            storage_path=s3.url(f"outage-{tmp_path.name}"),
        )
        assert outage.began is not None
        store = open_store(seen.config.run)
        names = checkpoint.names(store)
        marked = [name for name in names if store.exists(f"{name}/{checkpoint.COMPLETE}")]
        whole = [
            checkpoint.read(store, name)[0].step for name in marked
        ]  # raises where data is missing
        assert whole[0] == EVERY
        assert whole[-1] == STEPS
    return seen, outage, at


def test_training_does_not_wait_for_the_store(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen, outage, at = train_through(s3, tmp_path, monkeypatch, sync=False)
    assert seen.steps == list(range(1, len(at) + 1))
    gaps = [(before, after - before) for before, after in itertools.pairwise(at)][5:]
    inside = [gap for when, gap in gaps if outage.is_on(when)]
    outside = [gap for when, gap in gaps if not outage.is_on(when)]
    assert (
        len(inside) > 3 * EVERY
    )  # it went on through several checkpoints that could not be written
    p99 = [quantiles(values, n=100)[98] for values in (inside, outside)]
    with capsys.disabled():
        print(
            f"\nB11: {len(inside)} steps while the store was away for {AWAY_S} s; p99 of a step {p99[0] * 1e3:.0f} ms, "
            f"{p99[1] * 1e3:.0f} ms otherwise"
        )


def test_a_writer_that_waits_is_noticed(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teeth: with checkpoints that are waited for (planted), hardly a step is done during the outage."""
    _seen, outage, at = train_through(s3, tmp_path, monkeypatch, sync=True)
    assert sum(map(outage.is_on, at)) < EVERY
