"""`crab run` as a process of its own, with all that it starts: watched, killed, and looked after.

A run has a mark in its environment and a session of its own, so that its processes are found whatever becomes of
their parents, and nobody else's are touched.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

ROOT = Path(__file__).resolve().parents[2]
CLI = "from jobs.cli import main; main()"
LIMIT_S = 240.0
_MARK = "CRAB_TEST_RUN"
T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Poll until it holds and return what it gave: a slow machine makes a test slow, not red."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        time.sleep(0.01)
    return value


@contextmanager
def ray_home() -> Iterator[dict[str, str]]:
    """Environment of runs that share no files of Ray with anybody: its own HOME, its own folder of sessions."""
    # Under /tmp: the path of a Unix socket may have 107 bytes, and pytest's folders are long.
    home = tempfile.mkdtemp(prefix="crab-ray-", dir="/tmp")
    try:
        yield {"HOME": home, "RAY_TMPDIR": home}
    finally:
        shutil.rmtree(home, ignore_errors=True)


class CrabRun:
    """A started Python program of ours."""

    def __init__(
        self, arguments: Sequence[str], env: dict[str, str], folder: Path, code: str = CLI
    ) -> None:
        self._out = tempfile.TemporaryFile(dir=folder)
        self._err = tempfile.TemporaryFile(dir=folder)
        self._mark = secrets.token_hex(8)
        paths = [str(ROOT), str(ROOT / "platform"), str(ROOT / "tests")]
        outside = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=self._out,
            stderr=self._err,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=outside
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
            | env
            | {_MARK: self._mark},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        """False once it has ended well; an AssertionError with its last words if it failed by itself."""
        status = self._process.poll()
        assert status in (None, 0), f"exit {status}:\n{self.stderr()[-3000:]}"
        return status is None

    def kill(self) -> None:
        """SIGKILL to this process alone, as the kernel's out-of-memory killer does it."""
        self._process.kill()
        self._process.wait()

    def finish(self) -> Any:
        """Wait for the end and return what it printed as JSON; an AssertionError with its last words if it failed."""
        status = self._process.wait(LIMIT_S)
        assert status == 0, f"exit {status}:\n{self.stderr()[-3000:]}"
        return json.loads(self.stdout())

    def wait(self) -> int:
        return self._process.wait(LIMIT_S)

    def stdout(self) -> str:
        return _text(self._out.fileno())

    def stderr(self) -> str:
        return _text(self._err.fileno())

    def encode_actors(self) -> list[psutil.Process]:
        """Processes of Ray that encode, also while they start."""
        return self._below("MapWorker")

    def decode_children(self) -> list[psutil.Process]:
        return self._below("crab.media.child")

    def processes(self) -> list[psutil.Process]:
        """Everything that lives and was started by this run, also when its parents are gone."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def end_all(self) -> None:
        """Kill whatever is left."""
        if self._process.poll() is None:
            self.kill()
        for process in self.processes():
            kill(process)

    def _below(self, words: str) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in found if words in " ".join(_ask(process.cmdline) or [])]

    def _is_ours(self, process: psutil.Process) -> bool:
        if _ask(process.status) in (None, psutil.STATUS_ZOMBIE):
            return False
        try:
            # Ray's processes keep the session but lose their environment to the title that they show; a decode child
            # has a session of its own and keeps its environment.
            in_session = os.getsid(process.pid) == self.pid
        except ProcessLookupError:
            return False
        return in_session or (_ask(process.environ) or {}).get(_MARK) == self._mark


def kill(process: psutil.Process) -> bool:
    """SIGKILL; False when it had ended by itself."""
    try:
        process.send_signal(signal.SIGKILL)  # psutil checks that the id was not given away
    except psutil.NoSuchProcess:
        return False
    return True


def is_agent(process: psutil.Process) -> bool:
    """One of Ray's two agents of a node: they do no work of ours."""
    command = " ".join(_ask(process.cmdline) or [])
    return any(
        words in command
        for words in (
            "ray::DashboardAgent",
            "ray::RuntimeEnvAgent",
            "/agent.py ",
            "/agent/main.py ",
        )
    )


def describe(process: psutil.Process) -> str:
    """For messages: its id, its parent and the start of its command."""
    command = " ".join(_ask(process.cmdline) or [])
    return f"{process.pid} (child of {_ask(process.ppid)}): {command[:100]}"


def _ask(question: Callable[[], T]) -> T | None:
    """What a process says of itself; None where it has ended or is not ours."""
    try:
        return question()
    except (psutil.Error, ProcessLookupError, PermissionError):
        return None


def _text(handle: int) -> str:
    return os.pread(handle, os.fstat(handle).st_size, 0).decode(errors="replace")
