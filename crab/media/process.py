"""One decoding child as its parent sees it: started, asked, timed, killed.

A child is a fresh interpreter (`python -c`, not multiprocessing), so nothing of the parent's main
module runs again: it works the same under pytest, in a script without a `__main__` guard and inside
a Ray worker. Each child has a socket of its own: one that dies in the middle of an answer spoils
nothing for the others.
"""

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from crab.media.wire import ConnectionLostError, receive, send

START_LIMIT_S = 120.0
STDERR_TAIL = 2000

_BOOT = (
    "import json, sys; facts = json.loads(sys.argv[1]); sys.path[:] = facts['path']; "
    "from crab.media.child import main; "
    "main(facts['parent'], facts['socket'], facts['stderr_limit'])"
)
_STDERR_LIMIT = 1 << 20
_OUT_OF_MEMORY = ("bad_alloc", "MemoryError", "Cannot allocate memory")


class ChildTimeoutError(Exception):
    """The child did not answer in time."""


class ChildDiedError(Exception):
    """The child ended without an answer. `out_of_memory` if it said so before it went, `by_signal` if it was killed."""

    def __init__(self, detail: str, *, out_of_memory: bool, by_signal: bool = False) -> None:
        super().__init__(detail)
        self.out_of_memory = out_of_memory
        self.by_signal = by_signal


class ChildProcess:
    """A child that answers requests one at a time. Not thread safe; belongs to the thread that made
    it.

    The kernel kills a child when the *thread* that started it ends (PR_SET_PDEATHSIG): that is what
    stops a child stuck in native code after its parent was killed, and why a child must not outlive
    its thread.
    """

    def __init__(self, decode: Any, memory_bytes: int) -> None:
        """Start a child that will run `decode`, a module-level function. Raises RuntimeError if it
        cannot start, ChildDiedError if it was killed while it did: the next one may live.
        """
        self.num_answered = 0
        self._interrupted = False
        self._stderr = os.memfd_create("decode-child-stderr", os.MFD_CLOEXEC)
        self._socket, theirs = socket.socketpair()
        facts = {
            "path": [os.path.abspath(entry) for entry in sys.path],
            "parent": os.getpid(),
            "socket": theirs.fileno(),
            "stderr_limit": _STDERR_LIMIT,
        }
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(facts)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                env=os.environ | single,
                start_new_session=True,  # a group of its own: what it forks is killed with it
            )
        try:
            self.ask((decode, memory_bytes), START_LIMIT_S)
        except (ChildTimeoutError, ChildDiedError) as error:
            self.kill()
            if isinstance(error, ChildDiedError) and error.by_signal:
                raise
            raise RuntimeError(
                f"a decode child could not start: {error}; check that "
                f"`python -c 'import crab.media.clip'` works and "
                f"that {decode!r} can be imported"
            ) from error

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """False once the process has ended."""
        return self._exit() is None

    def _exit(self) -> tuple[int, int] | None:
        """(CLD_* code, status or signal) once ended, else None. Leaves it unreaped, so its id stays
        taken.
        """
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            ended = os.waitid(os.P_PID, self._process.pid, flags)
        except ChildProcessError:
            return os.CLD_EXITED, 0  # reaped by somebody else, so that its status is lost
        return None if ended is None else (ended.si_code, ended.si_status)

    def ask(self, question: Any, timeout_s: float) -> Any:
        """Send a question and wait for the answer. Raises ChildTimeoutError, ChildDiedError."""
        deadline = time.monotonic() + timeout_s
        os.ftruncate(self._stderr, 0)
        os.lseek(self._stderr, 0, os.SEEK_SET)
        try:
            send(self._socket, pickle.dumps(question, protocol=5))
            answer = receive(self._socket, deadline, self.is_alive)
        except TimeoutError as error:
            raise ChildTimeoutError(f"no answer within {timeout_s:g} s") from error
        except (ConnectionLostError, OSError) as error:
            raise self._death() from error
        self.num_answered += 1
        return pickle.loads(answer)

    def _death(self) -> ChildDiedError:
        limit = time.monotonic() + 5
        while (ended := self._exit()) is None:
            if self._interrupted or time.monotonic() > limit:
                return ChildDiedError("its socket was closed", out_of_memory=False)
            time.sleep(0.005)
        code, status = ended
        tail = self._stderr_tail()
        if code == os.CLD_EXITED:
            how = f"exited with status {status} and no answer"
        else:
            how = f"killed by {signal.Signals(status).name}"
        if status == signal.SIGKILL and code != os.CLD_EXITED:
            how += " (the kernel's out-of-memory killer, or somebody)"
        out_of_memory = any(sign in tail for sign in _OUT_OF_MEMORY)
        return ChildDiedError(
            f"{how}: {tail}" if tail else how,
            out_of_memory=out_of_memory,
            by_signal=code != os.CLD_EXITED,
        )

    def _stderr_tail(self) -> str:
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, STDERR_TAIL, max(0, size - STDERR_TAIL))
        return " ".join(tail.decode(errors="replace").split())[-300:]

    def interrupt(self) -> None:
        """Make a waiting `ask` fail, from another thread; the owner still has to `kill`."""
        # shutdown, not a signal: the owner may be reaping the process at this moment.
        self._interrupted = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """End the child and all it started. May be called twice."""
        if self._stderr < 0:
            return
        # Before the reaping `wait`: until then nobody else can have got its id.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        os.close(self._stderr)
        self._stderr = -1
