"""Attempts at a job: what they leave in a folder, and on a real S3 server that goes away and comes back."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from servers.fault_proxy import Fault, fault_proxy
from servers.seaweedfs import S3Server
from support.crab_runs import CLI, wait_for

from crab_platform import log_pieces
from crab_platform.attempts import Attempt, attempts, claim
from crab_platform.log_pieces import LogPieces
from crab_platform.storage import FolderStore, Store, open_store
from jobs.attempt import SUPERSEDED
from jobs.cluster_logs import LogReader

RUN = """
import sys
from jobs import attempt
attempt.WATCH_S, attempt.GRACE_S = 0.2, 5
sys.exit(attempt.attempt([sys.executable, "-c", {code!r}], bucket={bucket!r}, job="j", cluster={cluster!r}))
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return FolderStore(tmp_path / "bucket")


def started(store: Store, code: str, cluster: str = "c1") -> subprocess.Popen[bytes]:
    """An attempt in a process of its own."""
    text = RUN.format(code=code, bucket=store.url, cluster=cluster)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def log_of(attempt: Attempt) -> bytes:
    return b"".join(data for _, data in attempt.pieces())


def test_an_attempt_leaves_its_log_its_result_and_its_end(store: Store) -> None:
    code = 'import sys; print("working", file=sys.stderr); print(\'{"loss": 1.5}\'); sys.exit(3)'
    run = started(store, code)
    out, err = run.communicate()
    assert run.returncode == 3
    assert out == b'{"loss": 1.5}\n'
    assert b"working" in err
    (found,) = attempts(store, "j")
    assert found.began()["cluster"] == "c1"
    assert log_of(found) == b'working\n{"loss": 1.5}\n'
    ended = found.ended()
    assert ended is not None
    assert (ended["exit_code"], ended["result"]) == (3, {"loss": 1.5})
    with zipfile.ZipFile(io.BytesIO(store.read(f"{found.folder}/logs.zip"))) as archive:
        assert archive.testzip() is None


def test_a_child_that_is_killed_has_a_log_and_an_end(store: Store) -> None:
    code = 'import os; os.write(2, b"last words\\n"); os.kill(os.getpid(), 9)'
    run = started(store, code)
    run.communicate()
    assert run.returncode == 128 + signal.SIGKILL
    (found,) = attempts(store, "j")
    assert log_of(found) == b"last words\n"
    ended = found.ended()
    assert ended is not None
    assert (ended["exit_code"], ended["result"]) == (137, None)


def test_a_signal_reaches_the_child(store: Store) -> None:
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        'print("ready", file=sys.stderr, flush=True); time.sleep(60)'
    )
    run = started(store, code)
    wait_for(lambda: attempts(store, "j") and b"ready" in log_of(attempts(store, "j")[0]), "ready")
    run.send_signal(signal.SIGTERM)
    run.communicate()
    assert run.returncode == 143


def test_a_later_attempt_ends_the_one_before(store: Store) -> None:
    first = started(store, "import time; time.sleep(60)")
    wait_for(lambda: attempts(store, "j"), "the first attempt")
    second = started(store, "import time; time.sleep(2)", cluster="c2")
    first.communicate()
    second.communicate()
    assert (first.returncode, second.returncode) == (SUPERSEDED, 0)
    one, two = attempts(store, "j")
    assert b"attempt 2 has begun" in log_of(one)
    assert [a.began()["cluster"] for a in (one, two)] == ["c1", "c2"]


def test_twenty_who_claim_at_once_get_twenty_numbers(store: Store) -> None:
    with ThreadPoolExecutor(20) as pool:
        numbers = [a.number for a in pool.map(lambda n: claim(store, "j", {"n": n}), range(20))]
    assert sorted(numbers) == list(range(1, 21))
    latest = attempts(store, "j")[-1]
    assert not latest.is_superseded
    assert all(a.is_superseded for a in attempts(store, "j")[:-1])


def test_a_reader_goes_on_where_it_was(store: Store) -> None:
    seen = bytearray()
    reader = LogReader(store, "j", seen.extend)
    assert reader.read() is False
    first = claim(store, "j", {"cluster": "c1", "at": "now"})
    first.write_piece(1, b"a")
    assert reader.read() is True
    first.write_piece(2, b"b")
    second = claim(store, "j", {"cluster": "c2", "at": "now"})
    second.write_piece(1, b"c")
    assert reader.read() is True
    assert reader.read() is False
    assert bytes(seen) == b"abc"


@pytest.fixture
def outage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set the store answers 503."""
    away = threading.Event()

    def spoil(_method: str, _path: str) -> Fault:
        return 503 if away.is_set() else "pass"

    with fault_proxy(s3.endpoint, spoil) as endpoint:
        for name, value in replace(s3, endpoint=endpoint).env().items():
            monkeypatch.setenv(name, value)
        yield away


def test_a_log_survives_an_outage_and_nobody_waits_for_it(
    s3: S3Server, outage: threading.Event, tmp_path: Path
) -> None:
    store = open_store(s3.url(f"logs-{tmp_path.name}"), create_budget_s=0.5)
    with LogPieces(claim(store, "j", {}), pause_s=lambda _piece: 0.05) as log:
        written = [f"line {number}\n".encode() for number in range(300)]
        for number, data in enumerate(written):
            if number == 100:
                outage.set()
            log.write(data)
            time.sleep(0.01)
        outage.clear()  # only now: whoever waited for the store would wait for ever
    (found,) = attempts(store, "j")
    assert log_of(found) == b"".join(written), "whole, in order, nothing twice"


def test_a_log_that_outgrows_its_memory_says_what_is_lost(
    s3: S3Server, outage: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_pieces, "KEPT_BYTES", 100)
    store = open_store(s3.url(f"lost-{tmp_path.name}"), create_budget_s=0.5)
    attempt = claim(store, "j", {})
    log = LogPieces(attempt, pause_s=lambda _piece: 0.05)
    with log:
        outage.set()
        log.write(b"a" * 1000)
        log.write(b"b" * 90)
        assert log.close(patience_s=0.1) is False
        outage.clear()
        assert log.close() is True
    text = log_of(attempt)
    assert text.endswith(b"b" * 90)
    assert b"bytes are lost" in text
    assert len(text) < 300


def test_a_bucket_without_credentials_ends_an_attempt_at_its_start() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    environment |= {"CRAB_SPEC": "{}", "AWS_EC2_METADATA_DISABLED": "true"}
    command = [sys.executable, "-c", CLI, "attempt", "env:CRAB_SPEC"]
    options = ["--bucket", "s3://none/x", "--job", "j", "--cluster", "c"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert "AWS_" in done.stderr
