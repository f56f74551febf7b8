"""A notice that the end is near: what tells the workers of a run to write a checkpoint now.

Two things say so. The process that started the run is told to end (SIGTERM: a pod is deleted, a job is preempted), and
then the run writes a checkpoint and stops. Or Ray says that a node of the run is being taken away, and then the run
writes one at once and then after every step, until that happens.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

_POLL_S = 2.0
"""How often Ray is asked: the question is a barrier over all workers. Ray itself looks every 5 s."""

News = Literal["none", "save", "stop"]
"""What a step has to do: nothing, write a checkpoint, or write one and end the run."""


class Stopped(Exception):  # noqa: N818 (says what happened; it is no error)
    """The run was told to end before its last step, and has left a checkpoint."""


class Bell:
    """Rung by the driver, heard by rank 0. An actor: the two are in different processes."""

    def __init__(self) -> None:
        self._rung = False

    def ring(self) -> None:
        self._rung = True

    def rung(self) -> bool:
        return self._rung


@contextmanager
def rung_by_sigterm(told: threading.Event, is_at_work: Callable[[], bool]) -> Iterator[Any]:
    """A bell that SIGTERM rings, for as long as the block lasts, and who sets `told`. Outside the main thread only that
    does: signals do not get there.

    Args:
        is_at_work: whether there is a worker that will hear it. Where there is none, as long as the run waits for room
            or loads its model, the block is interrupted. Only in the main thread.

    Raises Stopped then. Ray Train itself would only listen when it has waited for room for a minute.
    """
    import ray

    actor: Any = ray.remote(num_cpus=0)(Bell)
    bell = actor.remote()

    def ring() -> None:
        told.wait()
        if ended.is_set():
            return
        bell.ring.remote()
        if in_main and not is_at_work() and not ended.wait(_POLL_S) and not is_at_work():
            alone.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def hear(*_: Any) -> None:
        # The handler may run inside a call of Ray's, where no other may be made: a thread rings.
        if alone.is_set():
            raise KeyboardInterrupt  # the only exception that leaves a call of Ray's
        told.set()

    ended, alone = threading.Event(), threading.Event()
    before = None
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        before = signal.signal(signal.SIGTERM, hear)
    thread = threading.Thread(target=ring, name="notice", daemon=True)
    thread.start()
    try:
        yield bell
    except KeyboardInterrupt as error:
        if not alone.is_set():
            raise
        raise Stopped(
            "stopped by SIGTERM before a worker had begun a step; start the same command again to go on"
        ) from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
        ended.set()
        told.set()
        thread.join()
        ray.kill(bell)


class Notice:
    """Asked by every rank after every step; all get the same answer."""

    def __init__(self, bell: Any, rank: int) -> None:
        self._bell = bell
        self._rank = rank
        self._asked_at = time.monotonic()
        self._leaving = False

    def news(self) -> News:
        """One small broadcast a step, and a barrier of Ray's every two seconds."""
        import ray
        import ray.train

        word = torch.zeros(1, dtype=torch.int64)
        if self._rank == 0:
            if self._bell is not None and ray.get(self._bell.rung.remote()):
                word[0] = 2
            elif time.monotonic() - self._asked_at > _POLL_S:
                self._asked_at = time.monotonic()
                word[0] = 1
        said = _from_rank_zero(word)
        if said == 2:
            return "stop"
        if said == 1:
            self._leaving = ray.train.get_preemption_info() is not None
        return "save" if self._leaving else "none"


def _from_rank_zero(word: torch.Tensor) -> int:
    if torch.distributed.get_backend() == "nccl":
        word = word.cuda()
    torch.distributed.broadcast(word, 0)
    return int(word.item())
