"""Writes checkpoints while training goes on: one at a time, the newest that waits, old ones removed after it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import TracebackType

from torch import Tensor

from crab_platform import checkpoint
from crab_platform.checkpoint import Marker
from crab_platform.storage import Store, StoreError

_LOG = logging.getLogger(__name__)
_RETRY_S = 5.0


class CheckpointWriter:
    """A thread that writes what it is given. At most two states are in memory: one that is written, one that waits.

    A store that does not answer costs the run nothing: the same checkpoint is tried again until a newer one takes its
    place, which the log says. What was given last is written before `close` returns, or `close` raises.
    """

    def __init__(self, store: Store, *, keep: int) -> None:
        self._store = store
        self._keep = keep
        self._changed = threading.Condition()
        self._waiting: tuple[Mapping[str, Tensor], Marker] | None = None
        self._writing = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, state: Mapping[str, Tensor], marker: Marker) -> None:
        """Hands over a state, which nobody changes after this. Raises what has ended the thread."""
        with self._changed:
            self._raise()
            if self._waiting is not None:
                _LOG.warning(
                    "no checkpoint at step %d: the one before it is still being written to %s",
                    *(self._waiting[1].step, self._store.url),
                )
            self._waiting = (state, marker)
            self._changed.notify_all()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until all that was submitted is written; False when the time is over before. Raises as `submit`."""
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._error or not (self._waiting or self._writing), timeout_s
            )
            self._raise()
            return bool(done)

    def close(self, timeout_s: float) -> None:
        """Waits, then ends the thread. Raises StoreError when the last checkpoint could not be written in time."""
        written = self.wait(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not written:
            raise StoreError(
                f"the last checkpoint was not written to {self._store.url} within {timeout_s:.0f} s; start the same "
                "command again when the store answers"
            )
        self._thread.join()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._write(*job)
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()
        except BaseException as error:  # told to whoever submits or waits
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> tuple[Mapping[str, Tensor], Marker] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            job, self._waiting = self._waiting, None
            self._writing = job is not None
            return job

    def _write(self, state: Mapping[str, Tensor], marker: Marker) -> None:
        while True:
            name = checkpoint.new_name(marker.step)
            try:
                checkpoint.write(self._store, name, state, marker)
            except StoreError as error:
                _LOG.warning("checkpoint of step %d: %s; trying again", marker.step, error)
            else:
                self._remove_old(name)
                return
            with self._changed:
                if self._changed.wait_for(
                    lambda: self._waiting is not None or self._closed, _RETRY_S
                ):
                    _LOG.warning("checkpoint of step %d is lost", marker.step)
                    return

    def _remove_old(self, written: str) -> None:
        """Removes all but the newest whole ones up to `written`, and what kills have left between them."""
        try:
            known = checkpoint.names(self._store)
            older = [name for name in reversed(known) if name <= written]
            whole = [n for n in older if self._store.exists(f"{n}/{checkpoint.COMPLETE}")]
            kept = set(whole[: self._keep])
            checkpoint.remove(self._store, [name for name in older if name not in kept])
        except StoreError as error:
            _LOG.warning("old checkpoints are left for later: %s", error)
