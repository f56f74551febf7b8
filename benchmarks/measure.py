"""Contenders that take turns, each in a process of its own: wall time, CPU seconds, peak memory, and what they read."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from blake3 import blake3

Arrays = Sequence[np.ndarray[Any, Any]]
Read = Callable[[Sequence[int]], Arrays]
"""Numbers of samples -> their arrays, in that order."""
Open = Callable[[Any, Any], Read]
"""(site, options) -> a reader, ready: connections and metadata that last are made here."""


@dataclass(frozen=True)
class Run:
    """One pass of one contender."""

    wall_s: float
    cpu_s: float
    nbytes: int
    digest: str
    peak_mb: float
    """Of the process so far."""


@dataclass
class Contender:
    """A reader in its own process; `error` says why it could not run."""

    name: str
    runs: list[Run] = field(default_factory=list)
    error: str = ""

    def start(self, open_reader: Open, site: Any, options: Any = None) -> Contender:
        """Start the process; it waits for `run`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(far, open_reader, site, options), daemon=True
        )
        self._process.start()
        far.close()
        return self

    def run(self, order: Sequence[int], *, keep: bool = True) -> None:
        """One pass over these samples; a failure is kept in `error`."""
        if self.error:
            return
        try:
            self._pipe.send(list(order))
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            answer = "its process died"
        if isinstance(answer, str):
            self.error = answer
        elif keep:
            self.runs.append(answer)

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()

    @property
    def best_mbs(self) -> float:
        """MB/s of the fastest pass."""
        return max(run.nbytes / run.wall_s for run in self.runs) / 1e6

    @property
    def median_mbs(self) -> float:
        """MB/s of the pass in the middle."""
        return statistics.median(run.nbytes / run.wall_s for run in self.runs) / 1e6

    @property
    def cpu_s_per_gb(self) -> float:
        """Of the cheapest pass."""
        return min(run.cpu_s / run.nbytes for run in self.runs) * 1e9

    @property
    def peak_mb(self) -> float:
        """Peak memory of the process, all that it returned included."""
        return max(run.peak_mb for run in self.runs)


def _serve(pipe: Connection, open_reader: Open, site: Any, options: Any) -> None:
    try:
        read = open_reader(site, options)
        while True:
            try:
                order = pipe.recv()
            except EOFError:
                return
            gc.collect()
            cpu, started = cpu_s(), time.perf_counter()
            arrays = read(order)
            wall, cpu = time.perf_counter() - started, cpu_s() - cpu
            hasher, nbytes = blake3(), 0
            for array in arrays:  # after the clock was stopped
                hasher.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
                nbytes += array.nbytes
            pipe.send(Run(wall, cpu, nbytes, hasher.hexdigest(), peak_mb()))
            del arrays
    except Exception as error:  # a peer that fails is told, and the others are measured
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def take_turns(contenders: Sequence[Contender], order: Sequence[int], repeats: int) -> None:
    """One pass that is not counted, then `repeats` rounds in which each runs once."""
    for number in range(repeats + 1):
        for contender in contenders:
            contender.run(order, keep=number > 0)


def disagreeing(contenders: Sequence[Contender], digest: str) -> list[str]:
    """Names of those that read something else in any pass."""
    return [c.name for c in contenders if any(run.digest != digest for run in c.runs)]


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (
            resource.getrusage(resource.RUSAGE_SELF),
            resource.getrusage(resource.RUSAGE_CHILDREN),
        )
    )


def peak_mb() -> float:
    """Largest resident memory that this process had, in MB. (ru_maxrss would start at the parent's.)"""
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmHWM")


def show(contenders: Sequence[Contender]) -> None:
    """A line a contender."""
    print(f"{'':30} {'MB/s best':>10} {'median':>8} {'CPU s/GB':>9} {'peak MB':>8}")
    for c in contenders:
        if c.error:
            print(f"{c.name:30} failed: {c.error}")
        else:
            print(
                f"{c.name:30} {c.best_mbs:10.0f} {c.median_mbs:8.0f} {c.cpu_s_per_gb:9.2f} "
                f"{c.peak_mb:8.0f}"
            )


@dataclass
class Goals:
    """What was asked for and what was found; the exit code of a benchmark."""

    failed: bool = False

    def check(self, what: str, found: float, wanted: float, *, at_most: bool = False) -> None:
        """Print one goal."""
        met = found <= wanted if at_most else found >= wanted
        self.failed |= not met
        sign = "<=" if at_most else ">="
        print(f"{'met   ' if met else 'MISSED'} {what}: {found:,.4g} (goal {sign} {wanted:,.4g})")

    def broken(self, what: str) -> None:
        """Something that makes figures worthless."""
        self.failed = True
        print(f"BROKEN {what}")


def versions(*names: str) -> str:
    """Names of packages with their versions."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} MISSING")
    return ", ".join(found)


def header(title: str) -> None:
    """Title, machine and load."""
    load = os.getloadavg()[0]
    print(f"\n== {title} ({os.cpu_count()} CPUs, load {load:.1f})")
    if load > 1.0:
        print("   the machine is busy: trust CPU seconds and ratios of best passes, not more")
