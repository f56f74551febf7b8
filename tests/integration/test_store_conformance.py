"""One set of promises, kept by a folder and a real S3 server; then what only S3 can suffer."""

from __future__ import annotations

import os
import pickle
import random
import secrets
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers.fault_proxy import fault_proxy
from servers.seaweedfs import S3Server

from crab_platform.storage import (
    AlreadyExists,
    ShortRead,
    Store,
    StoreUnreachable,
    open_store,
)

MIB = 1 << 20


def test_what_was_created_is_read_back(store: Store) -> None:
    for data in (b"", b"x", secrets.token_bytes(3 * MIB)):
        path = f"a/b-{len(data)}.bin"
        store.create(path, data)
        assert store.read(path) == data
        assert store.size(path) == len(data)
        assert store.exists(path)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_created(store: Store, kind: type) -> None:
    store.create("buffer", kind(b"some bytes"))
    assert store.read("buffer") == b"some bytes"


def test_a_second_create_fails_and_changes_nothing(store: Store) -> None:
    store.create("a", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(AlreadyExists, match="a exists already"):
            store.create("a", data)
    assert store.read("a") == b"first"


def test_sixteen_racing_writers_have_one_winner(store: Store) -> None:
    writers = [open_store(store.url) for _ in range(16)]
    for key in range(4):
        start = threading.Barrier(16)

        def attempt(
            number: int, key: int = key, start: threading.Barrier = start
        ) -> tuple[int, bool]:
            start.wait()
            try:
                writers[number].create(f"race/{key}", bytes([number]) * 50_000)
            except AlreadyExists:
                return number, False
            return number, True

        with ThreadPoolExecutor(16) as pool:
            winners = [number for number, won in pool.map(attempt, range(16)) if won]
        assert len(winners) == 1
        assert store.read(f"race/{key}") == bytes(winners) * 50_000


def test_ranges_equal_slices(store: Store) -> None:
    data = random.Random(5).randbytes(20 * MIB)
    store.create("big", data)
    ranges = [
        (0, 10),
        (5, 10),  # overlaps
        (19 * MIB, MIB),  # up to the end
        (3 * MIB, 14 * MIB),  # longer than a request
        (3 * MIB, 0),
        (8 * MIB - 3, 7),  # across a boundary between requests
        (1_500_000, 1),
        (0, 10),  # again
    ]
    assert store.read_ranges("big", ranges) == [data[at : at + n] for at, n in ranges]
    assert store.read_ranges("big", []) == []


def test_ranges_of_several_files_keep_their_order(store: Store) -> None:
    files = {f"f/{n}": bytes([n]) * (100 + n) for n in range(40)}
    for path, data in files.items():
        store.create(path, data)
    found = store.read_many({path: [(50, 7), (0, 3)] for path in files})
    assert found == {path: [data[50:57], data[:3]] for path, data in files.items()}
    order = [*files, *reversed(files)]
    assert store.read_all(order) == [files[path] for path in order]


def test_a_range_past_the_end_is_an_error(store: Store) -> None:
    store.create("short", b"0123456789")
    for wanted in ((5, 6), (10, 1), (100, 5)):
        with pytest.raises(ShortRead, match="short"):
            store.read_ranges("short", [wanted])
    with pytest.raises(ValueError, match="negative"):
        store.read_ranges("short", [(-1, 2)])


def test_list_is_sorted_below_a_folder(store: Store) -> None:
    assert store.list() == []
    for path in ("a/2", "a/1", "ab/3", "a/c/d", "top"):
        store.create(path, b"x")
    assert store.list("a") == ["a/1", "a/2", "a/c/d"]
    assert store.list() == ["a/1", "a/2", "a/c/d", "ab/3", "top"]
    assert store.list("none") == []


def test_missing_files_are_named(store: Store) -> None:
    store.create("folder/file", b"x")
    assert not store.exists("none")
    for path in ("none", "folder/none", "folder"):
        for ask in (
            store.read,
            store.size,
            lambda path: store.read_ranges(path, [(0, 1)]),
            lambda path: store.read_all([path]),
        ):
            with pytest.raises(FileNotFoundError) as error:
                ask(path)
            assert f"{store.url}/{path}" in str(error.value)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", ".hidden", "a/.b", "ä", "a b"]
)
def test_paths_that_climb_hide_or_confuse_are_refused(store: Store, path: str) -> None:
    for ask in (store.read, store.size, lambda path: store.create(path, b"x")):
        with pytest.raises(ValueError, match="not allowed"):
            ask(path)


def test_a_pickled_store_opens_again_elsewhere(store: Store) -> None:
    store.create("a", b"here")
    pickled = pickle.dumps(store)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert os.environ.get(name, "(unset)").encode() not in pickled
    code = (
        "import sys, pickle; store = pickle.loads(bytes.fromhex(sys.argv[1]));"
        "print(store.read('a').decode(), store.url)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, pickled.hex()],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["here", store.url]


WRITER = """
import sys
from crab_platform.storage import open_store
store = open_store(sys.argv[1])
data = bytes([int(sys.argv[2])]) * (24 << 20)
print("ready", flush=True)
for number in range(1000):
    store.create(f"w/{sys.argv[2]}-{number}", data)
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_whole_files_or_none(store: Store) -> None:
    chance = random.Random(11)
    for round_number in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.url, str(round_number)],
            env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        timer = threading.Timer(chance.uniform(0.02, 0.3), child.send_signal, [signal.SIGKILL])
        timer.start()
        said = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        timer.join()
        there = set(store.list("w"))
        assert {f"w/{round_number}-{n.decode()}" for n in said} <= there
    for path in store.list():
        assert path.startswith("w/")
        fill = int(path.split("/")[1].split("-")[0])
        assert store.read(path) == bytes([fill]) * (24 * MIB)


def test_opening_and_reading_a_folder_makes_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "later")
    assert store.list() == []
    assert not store.exists("a")
    assert not (tmp_path / "later").exists()


def test_a_folder_has_one_store_whatever_its_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("some where").create("a", b"x")
    for url in (tmp_path / "some where", f"file://{tmp_path}/some%20where"):
        assert open_store(url).read("a") == b"x"
    assert open_store("some where").url == str(tmp_path / "some where")


@pytest.mark.parametrize("url", ["gs://b/x", "http://host/x", "", "file://host/x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        open_store(url)


@pytest.mark.parametrize(
    "url", ["s3://key:hush@bucket/x", "s3://bucket/x?secret=hush", "s3://bucket/x#hush"]
)
def test_secrets_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="AWS_") as error:
        open_store(url)
    assert "hush" not in str(error.value)


def test_two_prefixes_of_a_bucket_do_not_see_each_other(s3: S3Server) -> None:
    one, other = open_store(s3.url("prefix/one")), open_store(s3.url("prefix/one2"))
    one.create("a", b"1")
    other.create("b", b"2")
    assert one.list() == ["a"]
    assert other.list() == ["b"]


def check_unreachable(url: str, *words: str) -> None:
    """Every verb says that the store cannot be used, naming the URL and what to check."""
    store = open_store(url, create_budget_s=0.5)
    for ask in (
        lambda: store.read("a"),
        lambda: store.read_ranges("a", [(0, 1)]),
        lambda: store.list(),
        lambda: store.create("a", b"x"),
    ):
        with pytest.raises(StoreUnreachable) as error:
            ask()
        for word in (url, *words):
            assert word in str(error.value)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    check_unreachable("s3://no-such-bucket/x", "'no-such-bucket'", "AWS_ENDPOINT_URL")


def test_wrong_credentials_are_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the secret")
    check_unreachable(s3.url("x"), "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")


def test_a_dead_endpoint_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    check_unreachable(s3.url("x"), "http://127.0.0.1:9")


def test_no_credentials_are_an_error_at_once(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StoreUnreachable, match="AWS_ACCESS_KEY_ID"):
        open_store(s3.url("x"))


def test_a_lost_answer_is_not_a_conflict(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}

    def lose_first(method: str, path: str) -> str:
        if method != "PUT":
            return "pass"
        seen[path] = seen.get(path, 0) + 1
        return "lose" if seen[path] == 1 else "pass"

    prefix = f"lost/{secrets.token_hex(6)}"
    with fault_proxy(s3.endpoint, lose_first) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(s3.url(prefix))
        for number in range(5):
            store.create(f"{number}", bytes([number]) * 1000)
    assert set(seen.values()) == {2}  # each was sent again, so each met its own first upload
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    store = open_store(s3.url(prefix))
    assert store.read_all(list("01234")) == [bytes([n]) * 1000 for n in range(5)]


def test_a_lost_answer_does_not_hide_another_writer(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"lost/{secrets.token_hex(6)}"
    open_store(s3.url(prefix)).create("taken", b"theirs")
    failures = iter(["reset"])

    def reset_first(method: str, path: str) -> str:
        return next(failures, "pass") if method == "PUT" else "pass"

    with fault_proxy(s3.endpoint, reset_first) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(AlreadyExists):
            open_store(s3.url(prefix)).create("taken", b"mine!!")
    assert next(failures, None) is None


@pytest.mark.parametrize("fault", [409, 429, 500, 503, "reset"])
def test_passing_trouble_is_outlived(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    failures = iter([fault, fault])

    def trouble(method: str, path: str) -> int | str:
        return next(failures, "pass") if method == "PUT" else "pass"

    with fault_proxy(s3.endpoint, trouble) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(s3.url(f"trouble/{secrets.token_hex(6)}"))
        store.create("a", b"data")
        assert next(failures, None) is None
        assert store.read("a") == b"data"


@pytest.mark.parametrize("fault", [409, 503, "reset"])
def test_lasting_trouble_ends_with_the_budget(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, fault: int | str
) -> None:
    with fault_proxy(s3.endpoint, lambda method, path: fault) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = open_store(s3.url("trouble/lasting"), create_budget_s=0.5)
        with pytest.raises(StoreUnreachable, match="attempts") as error:
            store.create("a", b"data")
        assert endpoint in str(error.value)
