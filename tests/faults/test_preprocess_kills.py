"""kill -9 in the middle of preprocessing: the driver, encode actors, decode children.

Each time the job goes on, or is started again with the same command. After the last time readers must see what a run
without faults leaves, bit for bit, and no more may have been done again than what was not committed.

CRAB_FAULT_SEED repeats the moments of a run that failed.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from support.cache_truth import Truth, committed, num_commits, problems, truth_of
from support.cheap_clips import make_clips
from support.crab_runs import CrabRun, describe, is_agent, kill, ray_home, wait_for
from support.opens import Opens
from support.planted_publish import COMMIT_FIRST, PACK_FIRST, killed_mark
from support.small_jobs import Encoders, spec_record

from crab.synth.dataset import synthesise

KILLS = 10
WORKER_KILLS = 50
CLIPS_PER_PACK = 2
PLANTED = "from support.planted_publish import main; main()"
NO_FAULTS = "no-faults"
FULL_CLIPS = 500
QUICK_CLIPS = 24

pytestmark = pytest.mark.ray


@dataclass(frozen=True, kw_only=True)
class Job:
    """A preprocess job over clips with a video and an audio stream each."""

    spec: Path
    clips: Path
    num_clips: int
    env: dict[str, str]
    folder: Path

    @property
    def num_packs(self) -> int:
        return -(-self.num_clips // CLIPS_PER_PACK)

    def start(self, cache: Path, *changes: str) -> CrabRun:
        sets = [part for change in (f"cache={cache}", *changes) for part in ("--set", change)]
        return CrabRun(["run", str(self.spec), *sets, "--json"], self.env, self.folder)


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with ray_home() as variables:
        yield variables


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("CRAB_FAULT_SEED") or secrets.randbelow(1 << 32))
    print(f"CRAB_FAULT_SEED={seed}")
    return random.Random(seed)


def make_job(folder: Path, num_clips: int, env: dict[str, str]) -> Job:
    samples = synthesise(folder / "shapes", num_clips, seed=3, workers=2, size=64)
    spec = {
        "job": "preprocess",
        "name": "kills",
        "data": [{"name": "shapes", "samples": str(samples)}],
        "cache": str(folder / "cache"),
        "runs": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "pipeline": {"clips_per_pack": CLIPS_PER_PACK, "encode_cpus": 0.5},
    }
    path = folder / "kills.yaml"
    path.write_text(json.dumps(spec))  # JSON is YAML
    return Job(
        spec=path, clips=samples.parent / "clips", num_clips=num_clips, env=env, folder=folder
    )


def make_cheap_job(folder: Path, num_clips: int, env: dict[str, str]) -> Job:
    """Many clips that cost little: what counts is how often something is killed, not what is in them."""
    clips = make_clips(folder / "clips", num_clips)
    record = spec_record(clips, str(folder / "cache"), Encoders(folder).record()) | {
        "name": "kills",
        "runs": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "pipeline": {"clips_per_pack": CLIPS_PER_PACK, "encode_cpus": 0.5},
    }
    path = folder / "kills.yaml"
    path.write_text(json.dumps(record))
    return Job(spec=path, clips=clips, num_clips=num_clips, env=env, folder=folder)


def start_planted(job: Job, *names: str) -> CrabRun:
    """Whole runs, one after the other on one cluster; the names of the caches say what is planted."""
    caches = [str(job.folder / name) for name in names]
    return CrabRun([str(job.spec), *caches], job.env, job.folder, code=PLANTED)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Job:
    return make_job(tmp_path_factory.mktemp("quick"), QUICK_CLIPS, env)


@pytest.fixture(scope="module")
def planted(quick: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The same job over copies of the clips: whose files are opened is watched."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(quick.clips.parent, folder / "shapes")
    return make_job(folder, QUICK_CLIPS, quick.env)


@pytest.fixture(scope="module")
def planted_runs(planted: Job) -> Iterator[CrabRun]:
    """Without faults, and killed between the two writes of a pack in either order. They go on beside the tests."""
    run = start_planted(planted, NO_FAULTS, PACK_FIRST, COMMIT_FIRST)
    yield run
    run.end_all()


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Job:
    return make_cheap_job(tmp_path_factory.mktemp("full"), FULL_CLIPS, env)


@pytest.fixture(scope="module")
def full_truth(full: Job) -> Truth:
    run = start_planted(full, NO_FAULTS)
    try:
        (result,) = run.finish()
    finally:
        run.end_all()
    return truth_of(str(full.folder / NO_FAULTS), result["manifest"])


def wait_for_moment(
    run: CrabRun, job: Job, cache: Path, opens: Opens, rng: random.Random, kills_left: int
) -> bool:
    """Wait until clips are read again, then for some commits, then a little; False when the run has ended before.

    The number of commits leaves enough of them for the kills to come.
    """
    seen, before = opens.total(), num_commits(cache)
    share = (job.num_packs - before - 2 * kills_left) // (kills_left + 1)
    wanted = before + rng.randint(0, max(0, share))
    wait_for(lambda: opens.total() > seen or not run.is_running(), "a clip that is read")
    wait_for(lambda: num_commits(cache) >= wanted or not run.is_running(), f"{wanted} commits")
    time.sleep(rng.uniform(0, 0.3))
    return run.is_running()


def wait_for_child(run: CrabRun) -> list[psutil.Process]:
    """The decode children, as soon as there is one; none when the run has ended."""
    found = wait_for(lambda: run.decode_children() or not run.is_running(), "a decode child")
    return found if isinstance(found, list) else []


def in_the_middle(job: Job, cache: Path) -> bool:
    return 0 < len(committed(cache)) < job.num_clips


def assert_nothing_left(run: CrabRun) -> None:
    """Ray needs a moment to see that its driver is gone; two agents of it wait a minute for its head (Ray 2.60)."""
    limit = time.monotonic() + 60
    while left := [process for process in run.processes() if not is_agent(process)]:
        assert time.monotonic() < limit, f"left over: {[describe(process) for process in left]}"
        time.sleep(0.1)


def check_end(job: Job, cache: Path, run: CrabRun, truth: Truth) -> dict[str, int]:
    """The end of the last run; returns its result."""
    result = run.finish()
    assert_nothing_left(run)
    assert problems(str(cache), result["manifest"], truth) == []
    assert len(truth.features) == 2 * job.num_clips
    assert result["set_aside"] == {}
    assert result["hits"] + result["encoded"] == 2 * job.num_clips
    return result


def kill_drivers(
    job: Job,
    cache: Path,
    rng: random.Random,
    kills: int,
    *changes: str,
    actors: int,
    machine: bool = False,
) -> int:
    """Start and kill; returns how many kills hit a job that had committed something and not all.

    Of what a killed run did, at most one pack an encode actor is lost, and no clip is read again that was committed.
    Workers live on for a second or two without their driver, and mostly commit what they were at. With `machine`
    everything dies at once, as when the machine does.
    """
    hits = 0
    lost: list[int] = []
    for kill_number in range(kills):
        before = committed(cache)
        with Opens(job.clips) as opens:
            run = job.start(cache, *changes)
            try:
                hit = wait_for_moment(run, job, cache, opens, rng, kills - kill_number)
                if machine:
                    run.end_all()
                run.kill()
                assert_nothing_left(run)
            finally:
                run.end_all()
            read = set(opens.count())
        after = committed(cache)
        hits += hit and in_the_middle(job, cache)
        assert not read & before
        lost.append(len(read - after))
        assert lost[-1] <= actors * CLIPS_PER_PACK
    print(f"{hits} of {kills} kills in the middle; clips lost in each: {lost}")
    return hits


def killed_in_the_middle(job: Job, rng: random.Random) -> Path:
    """A cache whose driver was killed when some clips were committed and some were not.

    On a fast machine a run may end before its kill, or its workers commit the rest after it: then another is begun.
    """
    for attempt in range(8):
        cache = job.folder / f"killed-{attempt}"
        if kill_drivers(job, cache, rng, 1, actors=1):
            return cache
    raise AssertionError("no kill of 8 hit a run in the middle")


def test_driver_child_and_actor_killed_once(
    quick: Job, planted: Job, planted_runs: CrabRun, rng: random.Random
) -> None:
    cache = killed_in_the_middle(quick, rng)
    kept = committed(cache)
    no_faults, *_ = planted_runs.finish()
    truth = truth_of(str(planted.folder / NO_FAULTS), no_faults["manifest"])
    with Opens(quick.clips) as opens:
        run = quick.start(cache)
        try:
            (child,) = wait_for_child(run)
            assert kill(child)  # while it starts
            assert wait_for_moment(run, quick, cache, opens, rng, 2)
            (actor,) = run.encode_actors()
            assert kill(actor)
            result = check_end(quick, cache, run, truth)
        finally:
            run.end_all()
        assert set(opens.count()).isdisjoint(kept)
    assert result["hits"] == 2 * len(kept)


def test_killed_between_the_two_writes(planted: Job, planted_runs: CrabRun) -> None:
    """The check has teeth: it passes for the order of the product, and fails for the other."""
    no_faults, *killed = planted_runs.finish()
    truth = truth_of(str(planted.folder / NO_FAULTS), no_faults["manifest"])
    found = {}
    for name, result in zip((PACK_FIRST, COMMIT_FIRST), killed, strict=True):
        cache = planted.folder / name
        assert killed_mark(cache).exists()
        found[name] = problems(str(cache), result["manifest"], truth)
    assert found[PACK_FIRST] == []
    unreadable = [text for text in found[COMMIT_FIRST] if text.startswith("the index: entry")]
    assert len(unreadable) == 2 * CLIPS_PER_PACK  # the streams of one pack that never came to exist


@pytest.mark.faults
@pytest.mark.parametrize(("machine", "kills"), [(False, KILLS), (True, 4)])
def test_driver_killed(
    full: Job, full_truth: Truth, rng: random.Random, machine: bool, kills: int
) -> None:
    """The driver alone, and with it everything that it started."""
    cache = full.folder / f"drivers-{machine}"
    two = "pipeline.encode_actors=2"
    began = time.monotonic()
    hits = kill_drivers(full, cache, rng, kills, two, actors=2, machine=machine)
    assert hits >= kills - kills // 4
    kept = committed(cache)
    run = full.start(cache, two)
    try:
        result = check_end(full, cache, run, full_truth)
    finally:
        run.end_all()
    assert result["hits"] == 2 * len(kept)
    print(f"{time.monotonic() - began:.0f} s; the last run: {result}")


@pytest.mark.faults
def test_random_worker_killed(full: Job, full_truth: Truth, rng: random.Random) -> None:
    """Encode actors and decode children, one or the other by chance, in one run (A4)."""
    cache = full.folder / "workers"
    began = time.monotonic()
    hits = Counter[str]()
    child_killed_at = -1
    with Opens(full.clips) as opens:
        run = full.start(cache)
        try:
            for kill_number in range(WORKER_KILLS):
                left = WORKER_KILLS - kill_number
                assert wait_for_moment(run, full, cache, opens, rng, left)
                kind = rng.choice(["actor", "child"])
                # A clip gets two attempts, so between two kills of its child there is a commit.
                if kind == "child" and num_commits(cache) > child_killed_at:
                    victims = wait_for_child(run)
                    child_killed_at = num_commits(cache)
                else:
                    kind, victims = "actor", wait_for(run.encode_actors, "an encode actor")
                hits[kind] += kill(rng.choice(victims)) and in_the_middle(full, cache)
            result = check_end(full, cache, run, full_truth)
        finally:
            run.end_all()
        again = opens.read_again()
    print(f"{dict(hits)} of {WORKER_KILLS} in the middle, {len(again)} clips read again")
    print(f"{time.monotonic() - began:.0f} s; {result}")
    assert hits.total() >= WORKER_KILLS - 5
    assert result["encoded"] == 2 * full.num_clips
    assert len(again) <= WORKER_KILLS * CLIPS_PER_PACK


@pytest.mark.faults
def test_decode_child_killed(full: Job, full_truth: Truth, rng: random.Random) -> None:
    """A clip gets two attempts, so no clip is hit twice: between two kills there is a commit."""
    cache = full.folder / "children"
    began = time.monotonic()
    hits = 0
    with Opens(full.clips) as opens:
        run = full.start(cache)
        try:
            (child,) = wait_for_child(run)
            assert kill(child)  # the first while it starts; one more than ten
            for kill_number in range(KILLS):
                before = num_commits(cache)
                wait_for(
                    lambda before=before: num_commits(cache) > before or not run.is_running(),
                    "one more commit",
                )
                assert wait_for_moment(run, full, cache, opens, rng, KILLS - kill_number)
                (child,) = wait_for_child(run)
                hits += kill(child) and in_the_middle(full, cache)
            result = check_end(full, cache, run, full_truth)
        finally:
            run.end_all()
        again = opens.read_again()
    assert hits >= KILLS - 2
    assert result["encoded"] == 2 * full.num_clips
    assert len(again) <= KILLS + 1
    print(f"{hits} of {KILLS} in the middle, {len(again)} clips read again")
    print(f"{time.monotonic() - began:.0f} s; {result}")
