"""Training processes of several launchers that take turns, one optimizer step each.

Every rank of every contender connects to the benchmark and waits there before each step. So all of them are up at the
same time, and only one of them computes: a slow moment of the machine touches all, and no start is in a step's time.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

_KEY = b"turns"
_START_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a rank says when it has done a step and waits for the next one."""

    wall_s: float
    """Of the step, from its turn to here; 0 before the first."""
    cpu_s: float
    """Of the rank's process, all threads, in the same time."""
    loss: float
    """Of the step, over all ranks; NaN before the first."""


class Turn:
    """A rank's side."""

    def __init__(self, port: int, name: str, rank: int) -> None:
        self._pipe = Client(("127.0.0.1", port), authkey=_KEY)
        self._pipe.send((name, rank))
        self._wall: float | None = None
        self._cpu = 0.0

    def wait(self, loss: float) -> None:
        """Says that a step is done, and waits for the turn of the next one. `loss`: of the step that is done."""
        now, cpu = time.perf_counter(), time.process_time()
        wall_s = 0.0 if self._wall is None else now - self._wall
        self._pipe.send(Arrival(wall_s=wall_s, cpu_s=cpu - self._cpu, loss=loss))
        self._pipe.recv()
        self._wall, self._cpu = time.perf_counter(), time.process_time()


@dataclass(kw_only=True)
class Contender:
    """A launcher with its ranks; what their steps took, in order."""

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str]
    wall_s: list[float] = field(default_factory=list)
    """Of the slower rank."""
    cpu_s: list[float] = field(default_factory=list)
    """Of both ranks."""
    losses: list[float] = field(default_factory=list)
    pipes: dict[int, Connection] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the launcher."""
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=self.environment
            )

    def step(self) -> None:
        """One step, done when all ranks wait again."""
        for pipe in self.pipes.values():
            pipe.send("go")
        arrivals = self.arrivals()
        self.wall_s.append(max(arrival.wall_s for arrival in arrivals))
        self.cpu_s.append(sum(arrival.cpu_s for arrival in arrivals))
        self.losses.append(arrivals[0].loss)

    def arrivals(self) -> list[Arrival]:
        """What each rank says, by rank. Raises RuntimeError with the end of its log when one is gone."""
        try:
            return [self.pipes[rank].recv() for rank in sorted(self.pipes)]
        except (EOFError, OSError) as error:
            raise RuntimeError(self.failure()) from error

    def failure(self) -> str:
        """The end of the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"{self.name} ended early:", *lines[-25:]])

    def stop(self) -> None:
        """Lets the ranks do one last step, which nobody times, and waits for the launcher's end."""
        for pipe in self.pipes.values():
            pipe.send("go")
        assert self.process is not None
        if self.process.wait() != 0:
            raise RuntimeError(self.failure())

    def kill(self) -> None:
        """Ends the launcher whatever it does; nothing when it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class Turns:
    """The benchmark's side: where the ranks connect."""

    def __init__(self) -> None:
        self._listener = Listener(("127.0.0.1", 0), authkey=_KEY)
        self.port: int = self._listener.address[1]
        # A launcher that dies before its ranks are here would be waited for without an end.
        self._listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]

    def gather(self, contenders: Sequence[Contender], num_ranks: int) -> None:
        """Starts contenders and waits until all their ranks are at their first step."""
        by_name = {contender.name: contender for contender in contenders}
        for contender in contenders:
            contender.start()
        deadline = time.monotonic() + _START_S
        while any(len(contender.pipes) < num_ranks for contender in contenders):
            try:
                pipe = self._listener.accept()
            except TimeoutError:
                for contender in contenders:
                    assert contender.process is not None
                    if contender.process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(contender.failure()) from None
                continue
            name, rank = pipe.recv()
            by_name[name].pipes[rank] = pipe
        for contender in contenders:
            contender.arrivals()


def play(contenders: Sequence[Contender], *, warm_up: int, rounds: int) -> range:
    """`warm_up` rounds and then `rounds`, in each of which every contender makes a step, one after the other.

    Returns the numbers of the steps that count, from the end: they are the last ones of each.
    """
    for _ in range(warm_up + rounds):
        for contender in contenders:
            contender.step()
    return range(-rounds, 0)


def ratio(ours: Contender, theirs: Contender, last: range) -> float:
    """Our wall time over theirs, the median of rounds: both are of the same moment."""
    return statistics.median(ours.wall_s[i] / theirs.wall_s[i] for i in last)


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of losses of the same step, as far as both have come; NaN where one is."""
    differences = [abs(a - b) for a, b in zip(one, other, strict=False)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def show(contenders: Sequence[Contender], last: range) -> None:
    """A line a contender."""
    print(f"{'':34} {'median s':>9} {'best s':>8} {'CPU s':>8} {'best CPU':>9}")
    for contender in contenders:
        wall, cpu = [contender.wall_s[i] for i in last], [contender.cpu_s[i] for i in last]
        print(
            f"{contender.name:34} {statistics.median(wall):9.3f} {min(wall):8.3f} "
            f"{statistics.median(cpu):8.3f} {min(cpu):9.3f}"
        )
