"""A log that goes to the bucket in pieces while it is written. Whoever writes never waits for the store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from crab_platform.attempts import Attempt
from crab_platform.storage import StoreError

_LOG = logging.getLogger(__name__)
KEPT_BYTES = 64 << 20
"""So much is kept while the store is away; what comes first then is lost, and the log says so."""
_FIRST_S, _LONGEST_S = 2.0, 15.0


def pause_s(piece: int) -> float:
    """Between pieces: short at first, when somebody looks; a day's log is 6,000 pieces."""
    return min(_LONGEST_S, _FIRST_S + piece / 20)


class LogPieces:
    """Use as a context, or call `close`."""

    def __init__(self, attempt: Attempt, pause_s: Callable[[int], float] = pause_s) -> None:
        self._attempt = attempt
        self._pause_s = pause_s
        self._waiting = bytearray()
        self._tried = b""
        """The piece that is written now: it stays as it is, since a try that seemed to fail may have arrived."""
        self._lost = 0
        self._written = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log pieces", daemon=True)

    def __enter__(self) -> LogPieces:
        self._thread.start()
        return self

    def write(self, data: bytes) -> None:
        with self._lock:
            self._waiting += data
            if (excess := len(self._waiting) - KEPT_BYTES) > 0:
                del self._waiting[:excess]
                self._lost += excess

    def close(self, patience_s: float = 60.0) -> bool:
        """Writes what is left; False where the store was away for all of the time, and the end of the log is lost."""
        self._is_over.set()
        self._thread.join()
        until = time.monotonic() + patience_s
        while not self._flush():
            if time.monotonic() > until:
                return False
            time.sleep(min(2.0, patience_s / 10))
        return True

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._is_over.wait(self._pause_s(self._written)):
            self._flush()

    def _flush(self) -> bool:
        """Whether all that was written is in the store."""
        if not self._tried:
            with self._lock:
                if self._lost:
                    self._tried = (
                        f"\n... {self._lost} bytes are lost: the store was away\n".encode()
                    )
                self._tried += self._waiting
                self._waiting.clear()
                self._lost = 0
        if not self._tried:
            return True
        try:
            self._attempt.write_piece(self._written + 1, self._tried)
        except StoreError as error:
            _LOG.warning("the log waits here until the store is back: %s", error)
            return False
        self._tried = b""
        self._written += 1
        return not self._waiting
