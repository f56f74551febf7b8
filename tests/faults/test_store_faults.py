"""Lost answers, throttling, stalls, killed uploaders, full and broken disks; and what a read and a write may ask for.

On a real S3 server behind a proxy that spoils requests, and on a folder whose system calls fail. Each check is also
given a planted bug, which it must find.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from cache_samples import entry, equal_to_stored, key
from servers.fault_proxy import Fault, PartOf, Traffic, fault_proxy, untouched
from servers.seaweedfs import S3Server
from support.disk_writer import IGNORES_ERRORS, IGNORES_SHORT_WRITES, SOUND, content, file_path

from crab_platform import objects
from crab_platform.cache import FeatureCache
from crab_platform.clock import Clock
from crab_platform.objects import STALL_S, ObjectStore, upload_limit_s
from crab_platform.packs import CorruptEntry, Entry, new_entry
from crab_platform.ranges import Piece, Range, plan
from crab_platform.retry import Taken, Transient, create_with_retries
from crab_platform.storage import (
    AlreadyExists,
    Buffers,
    Data,
    OnRange,
    Store,
    StoreError,
    StoreUnreachable,
    open_store,
)

MIB = 1 << 20
PUBLISHERS = 32
MOST_TRIES = 6

WRITE_FAULTS: tuple[Fault, ...] = (409, "deny", 429, 500, 503, "reset", "stall", "cut")
QUICK_READ_FAULTS: tuple[Fault, ...] = (429, 500, 503, "reset", "truncate")
"""Without a stall, which takes ten seconds."""

Loop = Callable[..., None]
"""What `create_with_retries` is."""


class Ration:
    """Faults for the requests of one method: each hits one of every `of` files, chosen by chance.

    A file that several of them hit meets them one after the other, one for each try; that after which the client has
    no reason to come again is the last.
    """

    def __init__(self, method: str, faults: Sequence[Fault], *, of: int) -> None:
        self.method = method
        self.faults = faults
        self.of = of
        self._chance = random.Random(7)
        self._dealt: list[list[Fault]] = []
        self._left: dict[str, list[Fault]] = {}

    def __call__(self, method: str, path: str) -> Fault:
        if method != self.method or "list-type" in path:
            return "pass"
        name = urlsplit(path).path
        if name not in self._left:
            self._left[name] = self._deal()
        left = self._left[name]
        return left.pop() if left else "pass"

    def _deal(self) -> list[Fault]:
        if not self._dealt:
            self._dealt = [[] for _ in range(self.of)]
            for fault in self._chance.sample(self.faults, len(self.faults)):
                hit = self._chance.choice(self._dealt)
                hit.insert(0 if fault == "deny" else len(hit), fault)
        return self._dealt.pop()


def forget_own(put: Callable[[], None], holds: Callable[[], bool], **limits: object) -> None:
    """Planted bug: every refusal is a conflict."""
    create_with_retries(put, lambda: False, **limits)  # type: ignore[arg-type]


def try_once(put: Callable[[], None], holds: Callable[[], bool], **limits: object) -> None:
    """Planted bug: the first trouble is the end."""
    try:
        put()
    except Taken as error:
        raise AlreadyExists(str(error)) from error
    except Transient as error:
        raise StoreUnreachable(str(error)) from error


def hope(put: Callable[[], None], holds: Callable[[], bool], **limits: object) -> None:
    """Planted bug: what was sent has arrived, whether an answer came or not."""
    try:
        put()
    except (Taken, Transient):
        pass


def through_proxy(monkeypatch: pytest.MonkeyPatch, url: str, endpoint: str) -> Store:
    with monkeypatch.context() as env:
        env.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(url)
        assert isinstance(store, ObjectStore)
        # Clients take the endpoint when they are made; these are all that the tests use.
        _ = store._reads, store._writes(1)
        assert list(store._writers) == [STALL_S]  # no upload can stall for longer
    return store


def publish(cache: FeatureCache, number: int) -> str:
    """Commit one entry; "" or what went wrong."""
    try:
        cache.commit([entry(number)])
    except StoreError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def publish_twice(cache: FeatureCache, number: int) -> str:
    """Planted bug: a failed publish is done again from the start, under new names."""
    return publish(cache, number) and publish(cache, number)


def publish_problems(
    store: Store, sound: Store, num: int, publish: Callable[[FeatureCache, int], str] = publish
) -> list[str]:
    """Publish through `store`, 32 at a time; what `sound`, the same place without faults, then holds."""
    cache = FeatureCache(store)
    began = time.monotonic()
    took: list[float] = []

    def timed(number: int) -> str:
        start = time.monotonic()
        said = publish(cache, number)
        took.append(time.monotonic() - start)
        return said

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        found = [said for said in pool.map(timed, range(num)) if said]
    print(
        f"{num} publishes in {time.monotonic() - began:.0f} s, the slowest {max(took):.1f} s, {len(found)} errors"
    )
    reader = FeatureCache(sound)
    index = reader.index()
    keys = [key(number).digest for number in range(num)]
    entries = index.lookup(keys)
    lost = [name for name in keys if name not in entries]
    found += [f"{name} is lost" for name in lost]
    if len(sound.list("commits")) + len(lost) != num or index.duplicates:
        found.append(f"{len(sound.list('commits'))} commits, {index.duplicates} duplicates")
    if len(sound.list("packs")) + len(lost) != num:
        found.append(f"{len(sound.list('packs'))} packs")
    if index.conflicts or index.skipped:
        found.append(f"conflicts {index.conflicts}, skipped {index.skipped}")
    for number, name in enumerate(keys):
        try:
            if name in entries and not equal_to_stored(reader.read([entries[name]])[0], number):
                found.append(f"{name} has other features")
        except CorruptEntry as error:
            found.append(str(error))
    return found


def tries(traffic: Traffic) -> Counter[int]:
    """Tries -> files that needed so many."""
    return Counter(Counter(request.path for request in traffic.of("PUT")).values())


def lost_answers(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    num: int,
    publish: Callable[[FeatureCache, int], str] = publish,
) -> list[str]:
    url = s3.url(f"lost/{secrets.token_hex(6)}")
    traffic = Traffic()
    with fault_proxy(s3.endpoint, Ration("PUT", ["lose"], of=10), traffic) as endpoint:
        store = through_proxy(monkeypatch, url, endpoint)
        found = publish_problems(store, open_store(url), num, publish)
    print(f"{traffic.count()}, {traffic.faults()}")
    assert traffic.faults()["lose"] >= num // 10
    return found


def test_lost_answers_are_neither_conflicts_nor_losses(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lost_answers(s3, monkeypatch, 50) == []


@pytest.mark.faults
def test_lost_answers_of_1000_publishes(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_answers(s3, monkeypatch, 1000) == []


def test_a_writer_who_forgets_its_own_uploads_is_caught(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "create_with_retries", forget_own)
    found = lost_answers(s3, monkeypatch, 30)
    assert any(problem.startswith("AlreadyExists") for problem in found)


def test_a_writer_who_starts_over_is_caught(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "create_with_retries", try_once)
    found = lost_answers(s3, monkeypatch, 30, publish_twice)
    assert any("duplicates" in problem or "packs" in problem for problem in found)


def trouble(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, num: int, faults: Sequence[Fault] = WRITE_FAULTS
) -> tuple[list[str], Traffic]:
    url = s3.url(f"trouble/{secrets.token_hex(6)}")
    traffic = Traffic()
    with fault_proxy(s3.endpoint, Ration("PUT", faults, of=20), traffic) as endpoint:
        store = through_proxy(monkeypatch, url, endpoint)
        found = publish_problems(store, open_store(url), num)
    stalls = traffic.stalled_s
    print(f"{traffic.count()}, {traffic.faults()}, tries {tries(traffic)}")
    print(
        f"stalls ended by the client after {min(stalls, default=0):.1f} to {max(stalls, default=0):.1f} s"
    )
    return found, traffic


def check_outlived(found: Sequence[str], traffic: Traffic, num: int) -> None:
    assert list(found) == []
    assert max(tries(traffic)) <= MOST_TRIES
    # A publish is two files, of which each fault hits one in twenty.
    assert all(traffic.faults()[str(fault)] == 2 * num // 20 for fault in WRITE_FAULTS)
    assert len(traffic.stalled_s) == traffic.faults()["stall"]


def test_all_kinds_of_trouble_are_outlived(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    check_outlived(*trouble(s3, monkeypatch, 40), 40)


@pytest.mark.faults
def test_all_kinds_of_trouble_in_1000_publishes(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_outlived(*trouble(s3, monkeypatch, 1000), 1000)


@pytest.mark.parametrize(
    ("planted", "symptom"),
    [(forget_own, "AlreadyExists"), (try_once, "StoreUnreachable"), (hope, "is lost")],
)
def test_careless_writers_are_caught(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, planted: Loop, symptom: str
) -> None:
    monkeypatch.setattr(objects, "create_with_retries", planted)
    found, _ = trouble(s3, monkeypatch, 20, [fault for fault in WRITE_FAULTS if fault != "stall"])
    assert any(symptom in problem for problem in found)


class FakeClock(Clock):
    """Time passes only while somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def random(self) -> float:
        return 0.5


def test_a_budget_ends_quick_failures_but_not_the_second_try_of_a_long_one() -> None:
    """A stalled upload of 256 MiB alone takes longer than the whole budget of a create."""
    clock = FakeClock()
    began: list[float] = []

    def fail_after(seconds: float) -> Callable[[], None]:
        def put() -> None:
            began.append(clock.now_s)
            clock.sleep(seconds)
            raise Transient("no answer")

        return put

    for seconds, most in ((0.0, 60), (10.0, 60), (520.0, 3 * 520)):
        began.clear()
        clock.now_s = 0.0
        with pytest.raises(StoreUnreachable, match="no answer"):
            create_with_retries(
                fail_after(seconds), lambda: False, clock=clock, budget_s=60, what="a"
            )
        assert len(began) >= 3
        assert began[-1] <= most


def test_an_upload_stalls_after_ten_seconds_and_two_a_mebibyte() -> None:
    sizes = [1, MIB, 4 * MIB, 32 * MIB, 256 * MIB, 1024 * MIB]
    assert [upload_limit_s(size) for size in sizes] == [10, 10, 16, 136, 520, 2056]


def test_a_body_that_came_too_slowly_is_sent_again(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url(f"slow/{secrets.token_hex(6)}")
    with fault_proxy(s3.endpoint, Ration("PUT", [400], of=1)) as endpoint:
        through_proxy(monkeypatch, url, endpoint).create("a", b"data")
    assert open_store(url).read("a") == b"data"


def test_of_two_that_write_the_same_bytes_one_loses(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bytes do not make a file ours: it may be a lock that somebody else took."""
    url = s3.url(f"lock/{secrets.token_hex(6)}")
    open_store(url).create("lock", b"")
    with fault_proxy(s3.endpoint, Ration("PUT", ["reset"], of=1)) as endpoint:
        store = through_proxy(monkeypatch, url, endpoint)
        with pytest.raises(AlreadyExists):
            store.create("lock", b"")


def read_problems(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    num: int,
    faults: Sequence[Fault] = QUICK_READ_FAULTS,
    *,
    retries: int = 5,
) -> list[str]:
    """Read entries one by one, 32 at a time, while answers are lost, late and cut short."""
    url = s3.url(f"reads/{secrets.token_hex(6)}")
    cache = FeatureCache(open_store(url))
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        placed = list(pool.map(lambda number: cache.commit([entry(number)])[0], range(num)))
    traffic = Traffic()
    client = objects._client

    def client_with_retries(bucket: str, prefix: str, *, limit_s: int, **_: int) -> object:
        return client(bucket, prefix, limit_s=limit_s, retries=retries)

    with (
        fault_proxy(s3.endpoint, Ration("GET", faults, of=20), traffic) as endpoint,
        monkeypatch.context() as planted,
    ):
        planted.setattr(objects, "_client", client_with_retries)
        spoiled = FeatureCache(through_proxy(monkeypatch, url, endpoint))

        def read(number: int) -> str:
            try:
                (arrays,) = spoiled.read([placed[number]])
            except (StoreError, CorruptEntry) as error:
                return f"{type(error).__name__}: {error}"
            return "" if equal_to_stored(arrays, number) else f"{number}: other features"

        with ThreadPoolExecutor(PUBLISHERS) as pool:
            found = [said for said in pool.map(read, range(num)) if said]
    print(f"{num} reads: {traffic.count()}, {traffic.faults()}, {len(found)} problems")
    return found


def test_reads_outlive_trouble(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_problems(s3, monkeypatch, 100) == []


@pytest.mark.faults
def test_1000_reads_outlive_trouble_and_stalls(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_problems(s3, monkeypatch, 1000, (*QUICK_READ_FAULTS, "stall")) == []


def test_reads_that_are_not_repeated_are_caught(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_problems(s3, monkeypatch, 40, retries=0)
    assert any(problem.startswith("StoreUnreachable") for problem in found)


UPLOADER = """
import sys, obstore
from crab_platform.storage import open_store
store, path, kind = open_store(sys.argv[1]), sys.argv[2], sys.argv[3]
data = bytes(range(256)) * (32 << 12)
client = store._writes(len(data))
if kind == "two-steps":  # the planted bug: the name is there before all bytes are
    obstore.put(client, path, data[: len(data) // 2], use_multipart=False)
    obstore.put(client, path, data, use_multipart=False)
elif kind == "multipart":  # another: parts are left behind, and no condition guards the first of them
    obstore.put(client, path, data, use_multipart=True, chunk_size=8 << 20)
else:
    store.create(path, data)
"""
UPLOAD = bytes(range(256)) * (32 << 12)


def killed_uploads(s3: S3Server, kills: int, kind: str) -> tuple[list[str], Traffic]:
    """Kill -9 uploaders of 32 MiB when so much of the body has passed; what is visible then and is not whole."""
    url = s3.url(f"kills/{secrets.token_hex(6)}")
    store = open_store(url)
    chance = random.Random(5)
    traffic = Traffic()
    found = []
    whole = 0
    for number in range(kills):
        children: list[subprocess.Popen[bytes]] = []

        def kill(children: list[subprocess.Popen[bytes]] = children) -> None:
            children[0].send_signal(signal.SIGKILL)
            children[0].wait()

        # The last one is killed when all has arrived, and before it hears so.
        share = 1.0 if number == kills - 1 else (number + chance.random()) / kills
        part = PartOf(share=share, then=kill)
        faults: list[Fault] = [part] if kind == "create" else ["pass", part]

        def spoil(method: str, path: str, faults: list[Fault] = faults) -> Fault:
            return faults.pop(0) if method == "PUT" and faults else "pass"

        with fault_proxy(s3.endpoint, spoil, traffic) as endpoint:
            child = subprocess.Popen(
                [sys.executable, "-c", UPLOADER, url, f"{number}", kind],
                env=os.environ | {"PYTHONPATH": ":".join(sys.path), "AWS_ENDPOINT_URL": endpoint},
            )
            children.append(child)
            assert child.wait() == -signal.SIGKILL
            part.done.wait()
        if store.exists(f"{number}"):
            if store.read(f"{number}") == UPLOAD:
                whole += 1
            else:
                found.append(f"upload {number}, killed at {share:.0%}, is visible in part")
    print(f"{kills} kills: {len(found)} partial, {whole} whole, {traffic.count()}")
    return found, traffic


def test_killed_uploads_are_not_visible(s3: S3Server) -> None:
    found, traffic = killed_uploads(s3, 4, "create")
    assert found == []
    assert traffic.count() == {
        "PUT": 4
    }  # one request each, and so no parts that anyone must clean up


@pytest.mark.faults
def test_twenty_killed_uploads_are_not_visible(s3: S3Server) -> None:
    found, traffic = killed_uploads(s3, 20, "create")
    assert found == []
    assert traffic.count() == {"PUT": 20}


def test_an_upload_in_two_steps_is_caught(s3: S3Server) -> None:
    found, _ = killed_uploads(s3, 2, "two-steps")
    assert found


def test_an_upload_in_parts_is_seen_at_the_proxy(s3: S3Server) -> None:
    _, traffic = killed_uploads(s3, 1, "multipart")
    assert traffic.count()["MULTIPART"] > 0


DISK_WRITER = str(Path(__file__).parents[1] / "support" / "disk_writer.py")
SYSTEM_CALLS = ("write", "fsync", "link,linkat", "mkdir,mkdirat", "unlink,unlinkat")


def run_writer(prefix: Sequence[str], folder: Path, *arguments: str) -> dict[int, str]:
    """Number -> what the writer said of it. Fails unless the writer comes to its own end."""
    done = subprocess.run(
        [*prefix, sys.executable, DISK_WRITER, str(folder), *arguments],
        env=os.environ
        | {"PYTHONPATH": ":".join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
        | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split() for line in done.stdout.splitlines())
    assert said
    return {int(number): word for number, word in said.items()}


def disk_problems(folder: Path, said: Mapping[int, str]) -> list[str]:
    """What readers of the folder see that is wrong. What was said to have failed may be there or not."""
    cache = FeatureCache(open_store(folder))
    index = cache.index()
    found = [f"{path} is {reason}" for path, reason in index.skipped_commits.items()]
    for number, word in said.items():
        entries = index.lookup([key(number).digest])
        if not entries and word == "ok":
            found.append(f"{number} is lost")
        try:
            if entries and not equal_to_stored(cache.read(list(entries.values()))[0], number):
                found.append(f"{number} has other features")
        except CorruptEntry as error:
            found.append(f"{number}: {error}")
    return found


@pytest.fixture
def strace() -> str:
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs strace: apt-get install strace")
    tried = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")
    return program


@pytest.fixture
def fiu_run() -> str:
    program = shutil.which("fiu-run")
    if program is None:
        pytest.skip("needs libfiu: apt-get install fiu-utils")
    return program


def broken_calls(
    strace: str, folder: Path, kind: str, injections: Sequence[str], first: int, count: int
) -> tuple[dict[int, str], int]:
    """Run the writer with failing system calls; what it said, and how many calls failed."""
    log = folder.with_suffix(".strace")
    calls = ",".join(injection.split(":")[0] for injection in injections)
    prefix = [strace, "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", f"trace={calls}"]
    prefix += [part for injection in injections for part in ("-e", f"inject={injection}")]
    said = run_writer(prefix, folder, kind, "entries", str(first), str(count))
    return said, len(re.findall(r"\(INJECTED\)", log.read_text()))


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_no_broken_call_publishes_anything_wrong(strace: str, tmp_path: Path, error: str) -> None:
    """Steps that no number of calls a commit divides, so that in turn each of them fails."""
    folder = tmp_path / "cache"
    steps = [11, 37, 13, 17, 19]
    injections = [
        f"{calls}:error={error}:when={step}+{step}"
        for calls, step in zip(SYSTEM_CALLS, steps, strict=True)
    ]
    said, failed = broken_calls(strace, folder, SOUND, injections, 0, 80)
    print(f"{failed} calls failed with {error}: {Counter(said.values())}")
    assert failed >= 20
    assert disk_problems(folder, said) == []
    if error == "ENOSPC":
        assert set(said.values()) == {"ok", "StoreUnreachable"}
    assert set(said.values()) <= {"ok", "StoreUnreachable", "StoreError"}


@pytest.mark.faults
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("calls", SYSTEM_CALLS)
def test_each_broken_call_alone(strace: str, tmp_path: Path, calls: str, error: str) -> None:
    """The first such call of a commit fails, then the second, and so on until there is none left."""
    folder = tmp_path / "cache"
    all_said: dict[int, str] = {}
    for number in range(1, 40):
        injection = f"{calls}:error={error}:when={number}"
        said, failed = broken_calls(strace, folder, SOUND, [injection], number, 1)
        all_said |= said
        assert disk_problems(folder, all_said) == []
        if not failed:
            break
    else:
        raise AssertionError(f"a commit makes more than 40 calls of {calls}")
    print(f"{calls}: {len(all_said) - 1} points, {Counter(all_said.values())}")
    assert all_said[number] == "ok"
    # The folders are there after the first commit, so mkdir is not needed and may fail at will.
    assert len(all_said) > 2 or calls.startswith("mkdir")


def test_ignored_errors_are_caught(strace: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    injections = ["write:error=ENOSPC:when=3+3"]
    said, _ = broken_calls(strace, folder, IGNORES_ERRORS, injections, 0, 6)
    assert disk_problems(folder, said)


def faulty_disk(fiu_run: str, folder: Path, kind: str, count: int) -> list[str]:
    """Create files under libfiu: short writes, and now and then a full or a broken disk."""
    points = [
        "name=posix/io/rw/write/reduce,probability=0.3",
        "name=posix/io/rw/write,probability=0.1,failinfo=28",
        "name=posix/io/sync/fsync,probability=0.03,failinfo=5",
    ]
    prefix = [fiu_run, "-x", "-f", ""]  # no remote control
    prefix += [part for point in points for part in ("-c", f"enable_random {point}")]
    said = run_writer(prefix, folder, kind, "files", "0", str(count))
    print(f"{count} files on a disk that fails at random: {Counter(said.values())}")
    store = open_store(folder)
    there = {path: store.read(path) for path in store.list()}
    found = [
        f"{number} is lost"
        for number, word in said.items()
        if word == "ok" and file_path(number) not in there
    ]
    found += [
        f"{number} has other bytes"
        for number in said
        if there.get(file_path(number), content(number)) != content(number)
    ]
    return found


def test_a_disk_that_fails_at_random_publishes_nothing_wrong(fiu_run: str, tmp_path: Path) -> None:
    assert faulty_disk(fiu_run, tmp_path / "store", SOUND, 100) == []


@pytest.mark.faults
def test_1000_files_on_a_disk_that_fails_at_random(fiu_run: str, tmp_path: Path) -> None:
    assert faulty_disk(fiu_run, tmp_path / "store", SOUND, 1000) == []


def test_ignored_short_writes_are_caught(fiu_run: str, tmp_path: Path) -> None:
    assert faulty_disk(fiu_run, tmp_path / "store", IGNORES_SHORT_WRITES, 100)


NUM_LARGE = 24
PER_PACK = 12


def large_entries() -> list[Entry]:
    """Half a mebibyte each, so that a pack of twelve has gaps that are not worth reading."""
    return [new_entry(key(n), {"x": np.full((512, 512), n, np.float32)}) for n in range(NUM_LARGE)]


class LooksFirst(ObjectStore):
    """Planted bug: asks before it writes."""

    def create(self, path: str, data: Data) -> None:
        if self.exists(path) or path in self.list("commits"):
            raise AlreadyExists(path)
        super().create(path, data)


class ReadsWhole(ObjectStore):
    """Planted bug: fetches all of a pack for any part of it."""

    def _read_pieces(self, path: str, pieces: Sequence[Piece]) -> list[memoryview]:
        return [memoryview(self.read(path))[piece.start : piece.stop] for piece in pieces]


class ReadsOneByOne(ObjectStore):
    """Planted bug: a request for every entry."""

    def read_many(
        self, wanted: Mapping[str, Sequence[Range]], on_range: OnRange | None = None
    ) -> dict[str, Buffers]:
        found: dict[str, Buffers] = {}
        for path, ranges in wanted.items():
            found[path] = [
                super(ReadsOneByOne, self).read_many({path: [one]})[path][0] for one in ranges
            ]
            for position, data in enumerate(found[path]):
                if on_range:
                    on_range(path, position, data)
        return found


def needless_requests(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, kind: type[ObjectStore]
) -> list[str]:
    """Write two packs and read entries of both; requests that were not needed for it."""
    url = s3.url(f"count/{secrets.token_hex(6)}")
    traffic = Traffic()
    found = []
    with (
        fault_proxy(s3.endpoint, untouched, traffic) as endpoint,
        monkeypatch.context() as env,
    ):
        env.setenv("AWS_ENDPOINT_URL", endpoint)
        new = large_entries()
        cache = FeatureCache(kind(url), pack_bytes=PER_PACK * new[0].nbytes)
        placed = cache.commit(new)
        if traffic.count() != {"PUT": 4}:
            found.append(f"to write two packs and their commits: {traffic.count()}")
        index = cache.index()
        for numbers in (range(NUM_LARGE), (0, 1, 2, 9, 10, 13, 13, 23), (5,)):
            traffic.requests.clear()
            keys = [placed[number].key for number in numbers]
            hits = index.lookup(keys)
            arrays = cache.read([hits[name] for name in keys])
            assert [int(one["x"][0, 0]) for one in arrays] == list(numbers)
            found += needless_reads(traffic, [hits[name] for name in keys])
    return found


def needless_reads(traffic: Traffic, entries: Sequence[Entry]) -> list[str]:
    found = []
    ranges: dict[str, list[Range]] = {}
    for one in entries:
        ranges.setdefault(one.pack, []).append((one.offset, one.length))
    pieces = {path: plan(wanted) for path, wanted in ranges.items()}
    if set(traffic.count()) != {"GET"}:
        found.append(f"other requests than GET: {traffic.count()}")
    if len(traffic.of("GET")) != sum(map(len, pieces.values())):
        found.append(f"{len(traffic.of('GET'))} GETs for {sum(map(len, pieces.values()))} ranges")
    for path, wanted in pieces.items():
        asked = sorted(
            request.range or (0, 1 << 60)
            for request in traffic.of("GET")
            if request.path.endswith(path)
        )
        if asked != [(piece.start, piece.stop - 1) for piece in wanted]:
            found.append(f"{path}: {asked}, expected {wanted}")
        if any(one[1] >= other[0] for one, other in pairwise(asked)):
            found.append(f"{path}: bytes that were read twice")
    print(f"{len(entries)} entries: {traffic.count()}")
    return found


def test_a_hit_reads_each_byte_once_and_nothing_is_listed(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert needless_requests(s3, monkeypatch, ObjectStore) == []


@pytest.mark.parametrize("planted", [LooksFirst, ReadsWhole, ReadsOneByOne])
def test_needless_requests_are_caught(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, planted: type[ObjectStore]
) -> None:
    assert needless_requests(s3, monkeypatch, planted)
