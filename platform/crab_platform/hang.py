"""Ranks that hang: found within a minute, with the stacks of all, and killed, so that Ray Train starts the group anew.

Every rank has a thread that tells an actor each `BEAT_S` seconds where the rank is, how many pieces of work it has done
and the stack of its main thread. The driver looks there. A rank that says nothing for `SILENT_S` is frozen, or its node
is; ranks that speak and get nothing done wait for one that never comes. One rank that hangs stops all, as collectives
wait for it, and so all are killed.

The stack is sent ahead because a frozen process cannot be asked for it. Ray itself takes ten minutes (health checks of
its controller), and gloo half an hour.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import psutil

from crab_platform.storage import Store, StoreError

_LOG = logging.getLogger(__name__)
BEAT_S = 2.0
SILENT_S = 30.0
_LIVES_S = 10.0
"""Who has said something within so many seconds is taken to live. Less than SILENT_S: nobody is killed for it."""
SLOWER_THAN_BEFORE = 10.0
"""A piece of work may take so many times as long as the longest before it."""

Phase = Literal["start", "data", "train", "end"]
"""Building the model, waiting for a batch, learning from it, writing what was learnt."""
PATIENCE_S = 900.0
"""For a piece of work in another phase than training, and for the first one there."""


_Process = tuple[int, float]
"""Pid and birth."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    node: str
    """Ray's id of its node."""
    pid: int
    born: float
    """When the process was made (s since 1970): with `pid`, the process and no later one of that number."""
    phase: Phase
    step: int
    """The last one that it has begun (1-based), 0 before the first."""
    idle_s: float
    """Since it got something done."""
    longest_s: float
    """Longest time that it took for a piece of work while training."""
    stack: str


class Pulse:
    """A rank's side. The main thread calls `did`; a thread of its own tells the actor, until the block ends."""

    def __init__(self, board: Any, rank: int, node: str) -> None:
        self._board, self._rank, self._node = board, rank, node
        self._main = threading.get_ident()
        self._born = psutil.Process().create_time()
        self._phase: Phase = "start"
        self._step = 0
        self._at = time.monotonic()
        self._longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="pulse", daemon=True)

    def did(self, phase: Phase, step: int) -> None:
        """A piece of work is done, a micro batch or an update; the next one is of this phase and step."""
        now = time.monotonic()
        if self._phase == phase == "train" and self._step == step:
            self._longest_s = max(self._longest_s, now - self._at)
        self._phase, self._step, self._at = phase, step, now

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(Exception):  # the driver is gone, and its actor with it
            self._board.leave.remote(self._rank, os.getpid())

    def _tell(self) -> None:
        while True:
            frame = sys._current_frames().get(self._main)
            stack = "".join(traceback.format_stack(frame)) if frame else ""
            beat = Beat(
                rank=self._rank,
                node=self._node,
                pid=os.getpid(),
                born=self._born,
                phase=self._phase,
                step=self._step,
                idle_s=time.monotonic() - self._at,
                longest_s=self._longest_s,
                stack=stack,
            )
            self._board.beat.remote(beat)
            if self._ended.wait(BEAT_S):
                return


class Board:
    """The last beat of every rank. An actor: ranks write, the driver reads."""

    def __init__(self) -> None:
        self._beats: dict[int, tuple[Beat, float]] = {}

    def beat(self, beat: Beat) -> None:
        self._beats[beat.rank] = beat, time.monotonic()

    def leave(self, rank: int, pid: int) -> None:
        found = self._beats.get(rank)
        if found is not None and found[0].pid == pid:
            del self._beats[rank]

    def read(self) -> list[tuple[Beat, float]]:
        """Beats and their age in seconds."""
        now = time.monotonic()
        return [(beat, now - at) for beat, at in self._beats.values()]


def verdict(beats: list[tuple[Beat, float]], limit_s: float) -> str | None:
    """Why the ranks are to be killed, or None. `limit_s`: so long may a piece of work take in training, or
    `SLOWER_THAN_BEFORE` times the longest before, where that is more.
    """
    for beat, age_s in beats:
        if age_s > SILENT_S:
            return f"rank {beat.rank} (pid {beat.pid}) has said nothing for {age_s:.0f} s: it is frozen, or its node is"
    if beats and all(beat.idle_s + age_s > _limit_s(beat, limit_s) for beat, age_s in beats):
        beat, age_s = max(beats, key=lambda pair: pair[0].idle_s)
        return f"no rank has got anything done in step {beat.step} for {beat.idle_s + age_s:.0f} s"
    return None


def _limit_s(beat: Beat, limit_s: float) -> float:
    if beat.phase != "train" or beat.longest_s == 0:
        return PATIENCE_S
    return max(limit_s, SLOWER_THAN_BEFORE * beat.longest_s)


def is_at_work(beats: list[tuple[Beat, float]]) -> bool:
    """Whether some rank lives and is past the building of its model."""
    return any(age_s < _LIVES_S and beat.phase != "start" for beat, age_s in beats)


def report(why: str, beats: list[tuple[Beat, float]]) -> str:
    """The stacks of all ranks as text."""
    lines = [why, ""]
    for beat, age_s in sorted(beats, key=lambda pair: pair[0].rank):
        lines += [
            f"rank {beat.rank}, pid {beat.pid} on node {beat.node}: phase {beat.phase}, step {beat.step}, "
            f"last heard of {age_s:.1f} s ago, then {beat.idle_s:.1f} s without anything done",
            beat.stack,
        ]
    return "\n".join(lines)


@contextmanager
def watched(store: Store, limit_s: float) -> Iterator[Any]:
    """An actor for the ranks of a run (see Pulse), watched by a thread for as long as the block lasts.

    Ranks that hang (see verdict) are killed; what they were doing is written to `store` under hangs/ before.
    """
    import ray

    make: Any = ray.remote(num_cpus=0)(Board)
    board = make.remote()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(BEAT_S):
            beats = ray.get(board.read.remote())
            why = verdict(beats, limit_s)
            if why is None:
                continue
            # Ranks that have died are not our business: Ray starts them again.
            there = _on_nodes(_alive, [beat for beat, _ in beats])
            for beat, _ in beats:
                if _process(beat) not in there:
                    ray.get(board.leave.remote(beat.rank, beat.pid))
            beats = [(beat, age_s) for beat, age_s in beats if _process(beat) in there]
            why = verdict(beats, limit_s)
            if why is not None:
                _keep(store, report(why, beats))
                _on_nodes(_kill, [beat for beat, _ in beats])

    thread = threading.Thread(target=watch, name="hang", daemon=True)
    thread.start()
    try:
        yield board
    finally:
        ended.set()
        thread.join()
        ray.kill(board)


def _keep(store: Store, text: str) -> None:
    name = f"hangs/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.txt"
    _LOG.error(
        "%s: killing all ranks; their stacks are in %s/%s", text.partition("\n")[0], store.url, name
    )
    try:
        store.create(name, text.encode())
    except StoreError as error:
        _LOG.error("%s\nwhich could not be kept: %s", text, error)


def _process(beat: Beat) -> _Process:
    return beat.pid, beat.born


def _on_nodes(act: Callable[[list[_Process]], list[_Process]], beats: list[Beat]) -> set[_Process]:
    """Calls `act` with the processes of each node, there; those that it names. A frozen process hears nothing but
    SIGKILL of its own node, and Ray's way of killing asks it first. A node that does not answer names all of its own.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes: Any = ray.nodes  # has no types
    alive = {node["NodeID"] for node in nodes() if node["Alive"]}
    of_node: dict[str, list[_Process]] = {}
    for beat in beats:
        of_node.setdefault(beat.node, []).append(_process(beat))
    named: set[_Process] = set()
    for node in of_node.keys() & alive:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        remote: Any = ray.remote(act)
        remote = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        try:
            named.update(ray.get(remote.remote(of_node[node]), timeout=SILENT_S))
        except ray.exceptions.RayError as error:
            _LOG.error("node %s does not answer: %s", node, error)
            named.update(of_node[node])
    return named


def _alive(processes: list[_Process]) -> list[_Process]:
    """Those that still are what they were."""
    return [process for process, _ in _of(processes)]


def _kill(processes: list[_Process]) -> list[_Process]:
    killed = []
    for process, handle in _of(processes):
        with suppress(psutil.NoSuchProcess):
            handle.kill()
            killed.append(process)
    return killed


def _of(processes: list[_Process]) -> Iterator[tuple[_Process, psutil.Process]]:
    for pid, born in processes:
        with suppress(psutil.NoSuchProcess):
            handle = psutil.Process(pid)
            if handle.create_time() == born and handle.status() != psutil.STATUS_ZOMBIE:
                yield (pid, born), handle
