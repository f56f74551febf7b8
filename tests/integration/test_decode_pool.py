"""The decode pool: what native code does to one clip costs that clip and no more."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import hostile
from support.media_files import counting_clip, tone

from crab.media import DecodePool, DecodeRequest, Reason, decode_clip
from crab.sampling import AudioSampling, VideoSampling

GIB = 1 << 30


def ask(source: str) -> DecodeRequest:
    return DecodeRequest(source=source, video=VideoSampling(num_frames=1, size=2))


def reasons(results) -> list[str | None]:
    """The reason of each result, None for a good one."""
    return [
        problems[0].reason if (problems := result.decoded.problems()) else None
        for result in results
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, limit_s: float = 20) -> bool:
    """Poll, so that a slow machine makes the test slow and not red."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def hostile_pool():
    with DecodePool(num_workers=2, timeout_s=1.5, memory_bytes=GIB, decode=hostile.by_name) as pool:
        yield pool


def test_real_clips_come_out_as_without_a_pool(tmp_path):
    paths = [
        counting_clip(tmp_path / f"{n}.mkv", n + 1, samples=tone([300 + 100 * n] * (n + 1)))
        for n in range(5)
    ]
    video, audio = VideoSampling(num_frames=4, size=32), AudioSampling(num_segments=3)
    requests = [DecodeRequest(source=str(path), video=video, audio=audio) for path in paths]
    with DecodePool(num_workers=2) as pool:
        results = list(pool.decode(requests))
    assert [result.index for result in results] == list(range(5))
    for result, request in zip(results, requests, strict=True):
        here = decode_clip(request.source, video=video, audio=audio)
        assert result.request == request
        assert result.attempts == 1
        np.testing.assert_array_equal(result.decoded.video, here.video)
        np.testing.assert_array_equal(result.decoded.audio, here.audio)
        assert result.decoded.media_sha256 == here.media_sha256


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("segfault", Reason.DECODE_CRASH),
        ("abort", Reason.DECODE_CRASH),
        ("exit", Reason.DECODE_CRASH),
        ("fork", Reason.DECODE_CRASH),
        ("busy", Reason.DECODE_TIMEOUT),
        ("sleep", Reason.DECODE_TIMEOUT),
        ("hold-gil", Reason.DECODE_TIMEOUT),
        ("allocate", Reason.DECODE_MEMORY),
        ("bad-alloc", Reason.DECODE_MEMORY),
        ("raise", Reason.CORRUPT),
        ("flood", None),
    ],
)
def test_a_hostile_decoder_costs_its_clip_only(hostile_pool, kind, reason):
    results = list(hostile_pool.decode([ask("a"), ask(kind), ask("b"), ask("c")]))
    assert reasons(results) == [None, reason, None, None]
    expected = (
        2 if reason in (Reason.DECODE_CRASH, Reason.DECODE_TIMEOUT, Reason.DECODE_MEMORY) else 1
    )
    assert [result.attempts for result in results] == [1, expected, 1, 1]


def test_a_crash_is_told_by_its_signal(hostile_pool):
    (result,) = hostile_pool.decode([ask("segfault")])
    assert "SIGSEGV" in result.decoded.problems()[0].detail


def test_every_stream_asked_for_carries_the_reason(hostile_pool):
    both = DecodeRequest(source="exit", video=VideoSampling(), audio=AudioSampling())
    (result,) = hostile_pool.decode([both])
    assert result.decoded.video.reason == Reason.DECODE_CRASH
    assert result.decoded.audio.reason == Reason.DECODE_CRASH


def test_what_a_decoder_forks_dies_with_it(hostile_pool):
    mine = str(os.getpid())

    def strays() -> list[str]:
        """Processes whose command is a decode child's and that the pool does not own."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (OSError, NotADirectoryError):
                continue
            owned = entry.name in map(str, hostile_pool.child_pids())
            if "crab.media.child" in command and f'"parent": {mine}' in command and not owned:
                found.append(entry.name)
        return [pid for pid in found if is_running(int(pid))]

    before = set(strays())  # of pools that other tests left to the garbage collector
    list(hostile_pool.decode([ask("fork")]))
    assert wait_until(lambda: not set(strays()) - before), strays()


def test_a_clip_gets_two_attempts_in_all(hostile_pool, tmp_path):
    (result,) = hostile_pool.decode([ask(f"count:{tmp_path / 'count'}")])
    assert (tmp_path / "count").read_text() == "xx"
    assert result.attempts == 2


def test_a_second_attempt_may_succeed(hostile_pool, tmp_path):
    (result,) = hostile_pool.decode([ask(f"once:{tmp_path / 'flag'}")])
    assert reasons([result]) == [None]
    assert result.attempts == 2


def test_a_child_killed_at_work_is_replaced(hostile_pool):
    results = hostile_pool.decode([ask("slow:0.8"), ask("slow:0.8"), ask("a")])
    killer = threading.Timer(
        0.4, lambda: [os.kill(p, signal.SIGKILL) for p in hostile_pool.child_pids()]
    )
    list(hostile_pool.decode([ask("a"), ask("b")]))  # the children are up
    killer.start()
    done = list(results)
    assert reasons(done) == [None, None, None]
    assert max(result.attempts for result in done) == 2


def test_children_killed_while_their_answers_travel_spoil_nothing(hostile_pool):
    # pebble's pool does not survive this.
    stop = threading.Event()

    def kill_now_and_then():
        while not stop.wait(0.35):
            for pid in hostile_pool.child_pids()[:1]:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        results = list(hostile_pool.decode([ask("big") for _ in range(10)]))
    finally:
        stop.set()
        killer.join()
    assert len(results) == 10
    assert set(reasons(results)) <= {None, Reason.DECODE_CRASH}
    assert reasons(hostile_pool.decode([ask("a"), ask("b")])) == [None, None]


def test_an_idle_child_killed_costs_no_attempt(hostile_pool):
    list(hostile_pool.decode([ask("a"), ask("b")]))
    for pid in hostile_pool.child_pids():
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not hostile_pool.child_pids())
    results = list(hostile_pool.decode([ask("a"), ask("b")]))
    assert [result.attempts for result in results] == [1, 1]


def test_children_are_replaced_after_so_many_clips():
    with DecodePool(num_workers=1, max_items_per_child=3, decode=hostile.by_name) as pool:
        pids = [r.decoded.media_sha256 for r in pool.decode([ask("a") for _ in range(8)])]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 2]


def test_children_carry_no_torch():
    with DecodePool(num_workers=1) as real:
        real_answer = list(real.decode([ask("/no/such/file")]))
    assert reasons(real_answer) == [Reason.NOT_FOUND]
    with DecodePool(num_workers=1, decode=hostile.by_name) as pool:
        (result,) = pool.decode([ask("modules")])
    modules = set(result.decoded.backend.split(","))
    assert "crab.media.clip" in modules
    assert not modules & {"torch", "ray", "transformers"}


def test_results_may_come_as_they_are_done(hostile_pool):
    results = list(hostile_pool.decode([ask("slow:0.7"), ask("a"), ask("b")], ordered=False))
    assert sorted(result.index for result in results) == [0, 1, 2]
    assert results[0].index != 0


def test_requests_are_taken_only_as_there_is_room(hostile_pool):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ask("a")

    results = hostile_pool.decode(endless())
    for _ in range(3):
        next(results)
    assert len(taken) <= 3 + 4  # two per child beyond what was given out


def test_closing_kills_busy_children_and_wakes_the_reader():
    pool = DecodePool(num_workers=2, timeout_s=600, decode=hostile.by_name)
    results = pool.decode([ask("a"), ask("sleep")], ordered=True)
    next(results)
    pids = pool.child_pids()
    threading.Timer(0.2, pool.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        next(results)
    pool.close()
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="closed"):
        next(pool.decode([ask("a")]))


def test_nothing_is_left_open(hostile_pool):
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    list(hostile_pool.decode([ask("a"), ask("b")]))
    before = open_files()
    list(hostile_pool.decode([ask(kind) for kind in ("exit", "segfault", "raise", "exit")]))
    assert wait_until(lambda: len(hostile_pool.child_pids()) == 0 or open_files() <= before)
    list(hostile_pool.decode([ask("a"), ask("b")]))
    assert open_files() <= before


@pytest.mark.parametrize("kind", ["hold-gil", "busy"])
def test_children_stuck_in_native_code_die_with_a_killed_parent(kind):
    script = textwrap.dedent(
        f"""
        import sys, threading, time
        from crab.media import DecodePool, DecodeRequest
        from crab.sampling import VideoSampling
        from support import hostile

        pool = DecodePool(num_workers=2, timeout_s=600, decode=hostile.by_name)
        request = DecodeRequest(source="{kind}", video=VideoSampling())
        threading.Thread(target=lambda: list(pool.decode([request] * 2)), daemon=True).start()
        while len(pool.child_pids()) < 2:
            time.sleep(0.02)
        time.sleep(0.3)  # they have begun
        print(*pool.child_pids(), flush=True)
        time.sleep(600)
        """
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        parent.kill()
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_a_child_that_cannot_start_is_an_error_not_a_verdict_on_the_clip(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        DecodePool(num_workers=1, decode=hostile.by_name) as pool,
        pytest.raises(RuntimeError, match="could not start"),
    ):
        list(pool.decode([ask("a")]))


def test_a_decode_function_that_children_cannot_import_is_named():
    with pytest.raises(ValueError, match="module-level function"):
        DecodePool(num_workers=1, decode=lambda request: None)


@pytest.mark.parametrize(
    "wrong",
    [{"num_workers": 0}, {"timeout_s": 0}, {"memory_bytes": -1}, {"max_items_per_child": 0}],
)
def test_limits_must_be_positive(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecodePool(**{"num_workers": 1, **wrong})
