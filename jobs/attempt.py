"""One attempt at a job on a cluster: `crab run` in a child process, its log and its end kept in the bucket.

A process of its own, so that a child that is killed (no memory, a crash in native code) still has a log and an end.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from crab_platform.attempts import Attempt, claim
from crab_platform.log_pieces import LogPieces
from crab_platform.ray_cluster import CODE_FOLDER
from crab_platform.storage import StoreError, open_store
from jobs.code_zip import unpack

SUPERSEDED = 75
"""Exit code of an attempt that a later one has ended."""
WATCH_S = 10.0
"""How often it is asked whether there is a later attempt."""
GRACE_S = 30.0
"""For the child to end by itself, before it is killed."""
RAY_LOGS = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "session_latest", "logs")
_TAIL_BYTES, _ZIP_BYTES = 4 << 20, 64 << 20


def attempt(
    command: Sequence[str],
    *,
    bucket: str,
    job: str,
    cluster: str,
    code: str | None = None,
    client_version: str | None = None,
) -> int:
    """Runs a command and keeps its log, Ray's logs and its end under `bucket`/jobs/`job`.

    Standard error is the log; the last line of standard output is its result, as JSON. SIGTERM and SIGINT go to the
    child. The child is ended when a later attempt of the same job begins.

    Args:
        code: path in the bucket of a zip (code_zip.py) whose packages are taken instead of the image's.
        client_version: of who submitted; where it is not the image's and no code was sent, the log says so.

    Returns:
        The child's exit code, 128 + N where signal N killed it, SUPERSEDED where a later attempt has begun.

    Raises:
        ValueError: the zip is not what its name says.
        StoreUnreachable: the bucket cannot be used at the start. Later on nothing waits for it.
    """
    began = time.time()
    store = open_store(bucket)
    environment = dict(os.environ)
    if code is not None:
        folder = str(unpack(store, code, Path(tempfile.mkdtemp(prefix="crab-code-"))))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environment |= {"PYTHONPATH": path, CODE_FOLDER: folder}
    mine = claim(
        store,
        job,
        {
            "cluster": cluster,
            "at": _at(began),
            "version": version("crab-platform"),
            "code": code,
            "command": list(command),
        },
    )
    log = LogPieces(mine)
    if code is None and client_version not in (None, version("crab-platform")):
        said = (
            f"the image has version {version('crab-platform')}, who submitted has {client_version}"
        )
        log.write(f"crab: {said}; crab submit --code takes the newer code along\n".encode())
    superseded = threading.Event()
    with log, _started(command, environment) as child:
        output, errors = child.stdout, child.stderr
        assert output is not None
        assert errors is not None
        with _signals_to(child), _ended_when_superseded(mine, child, superseded, log):
            results: list[bytes] = []
            reader = threading.Thread(target=lambda: results.append(output.read()), daemon=True)
            reader.start()
            _pass_on(errors, log)
            status = child.wait()
            reader.join()
        sys.stdout.buffer.write(results[0])
        sys.stdout.flush()
        log.write(results[0])
        status = SUPERSEDED if superseded.is_set() else status if status >= 0 else 128 - status
        if not log.close():
            _say("the end of the log is not in the bucket, which does not answer")
    ended = time.time()
    try:
        mine.keep("logs.zip", _zipped(RAY_LOGS))
        mine.end(
            {
                "exit_code": status,
                "at": _at(ended),
                "seconds": ended - began,
                "result": _result(results[0]),
            }
        )
    except StoreError as error:
        _say(f"the end of this attempt is not in the bucket: {error}")
    return status


def _started(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )


def _pass_on(pipe: IO[bytes], log: LogPieces) -> None:
    while data := pipe.read(1 << 16):  # unbuffered: what is there now
        sys.stderr.buffer.write(data)
        sys.stderr.flush()
        log.write(data)


@contextmanager
def _signals_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, _frame: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ended_when_superseded(
    mine: Attempt, child: subprocess.Popen[bytes], superseded: threading.Event, log: LogPieces
) -> Iterator[None]:
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(WATCH_S):
            try:
                if not mine.is_superseded:
                    continue
            except StoreError as error:  # nothing is known; asked again
                _say(f"whether a later attempt has begun is not known: {error}")
                continue
            superseded.set()
            log.write(f"attempt {mine.number + 1} has begun; this one ends\n".encode())
            child.terminate()
            if not is_over.wait(GRACE_S):
                child.kill()
            return

    thread = threading.Thread(target=watch, name="superseded", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _zipped(folder: Path) -> bytes:
    """All files of a folder, of each the end; the newest first, as many as there is room for."""
    buffer, total = io.BytesIO(), 0
    files = sorted(
        (path for path in folder.rglob("*") if path.is_file()),
        key=lambda path: -path.stat().st_mtime,
    )
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                data = file.read(_TAIL_BYTES)
            total += len(data)
            if total > _ZIP_BYTES:
                break
            archive.writestr(str(path.relative_to(folder)), data)
    return buffer.getvalue()


def _result(output: bytes) -> Mapping[str, Any] | None:
    lines = output.decode(errors="replace").strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _say(text: str) -> None:
    print(f"crab: {text}", file=sys.stderr, flush=True)
