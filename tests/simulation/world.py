"""Simulated time and processes: greenlets that a seeded scheduler runs one at a time.

A process is a name, a clock that may be wrong, and one or more tasks (its main program, and what stands for its
threads). Tasks switch only where they wait: for the store, for a lock, for time to pass. So a history is a function of
its seed, and can be run again step by step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from greenlet import getcurrent, greenlet

from crab_platform.clock import Clock

BASE_NS = 1_800_000_000_000_000_000
"""When histories begin, in nanoseconds since 1970."""


class Killed(BaseException):
    """The process of this task is dead. Not an Exception: nothing in the product may hold it up."""


class Task(greenlet):
    """One line of execution of a process."""

    process: Process
    turn = 0
    """Which wait it is in: an older wake-up is ignored."""


class Process:
    """One virtual machine or job, with a clock of its own."""

    def __init__(self, world: World, name: str, skew_s: float) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.error: BaseException | None = None
        self.paused_until = 0.0
        self.tasks: list[Task] = []
        self.clock = ProcessClock(world, skew_s)
        self.stats: dict[str, int] = {}

    def kill(self) -> None:
        """Ends all tasks where they are; what they sent is on its way."""
        self.dead = True
        self.world.note(self.name, "DIES")
        for task in self.tasks:
            self.world.wake(task)

    def pause(self, seconds: float) -> None:
        """Stops all tasks for a while, as a suspended machine does."""
        self.paused_until = max(self.paused_until, self.world.now + seconds)
        self.world.note(self.name, f"is suspended for {seconds:.0f} s")


class ProcessClock(Clock):
    """What one process believes about time, and its chance."""

    def __init__(self, world: World, skew_s: float) -> None:
        self._world = world
        self._offset_ns = BASE_NS + int(skew_s * 1e9)
        self._rng = world.rng

    def time_ns(self) -> int:
        return self._offset_ns + int(self._world.now * 1e9)

    def monotonic(self) -> float:
        return self._world.now

    def sleep(self, seconds: float) -> None:
        self._world.wait(seconds)

    def new_id(self) -> str:
        return f"{self.time_ns():016x}-{self._rng.getrandbits(64):016x}"

    def random(self) -> float:
        return self._rng.random()


class World:
    """The scheduler. `now` is true time in seconds since the history began."""

    def __init__(self, seed: int, *, trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.tracing = trace
        self.trace: list[str] = []
        self._hub = getcurrent()
        self._events: list[tuple[float, int, Any, int]] = []
        self._count = 0

    def note(self, who: str, *what: str) -> None:
        """A line of the history."""
        if self.tracing:
            self.trace.append(f"{self.now / 3600:9.4f} h  {who:<14} {''.join(what)}")

    def at(self, seconds: float, action: Callable[[], Any]) -> None:
        """Calls `action` in so many seconds."""
        self._count += 1
        heappush(self._events, (self.now + seconds, self._count, action, -1))

    def start(self, process: Process, program: Callable[[], None], in_s: float = 0.0) -> Task:
        """A new task of a process."""

        def run() -> None:
            try:
                self._rest(task)
                program()
            except Killed:
                pass
            except Exception as error:  # kept: the ledger judges it
                process.error = error
                self.note(process.name, f"ends with {type(error).__name__}: {error}")

        task = Task(run, self._hub)
        task.process = process
        process.tasks.append(task)
        self._push(task, in_s)
        return task

    def wait(self, seconds: float) -> None:
        """Lets `seconds` pass for the task that calls; outside of tasks time just goes on."""
        task = getcurrent()
        if not isinstance(task, Task):
            self.now += seconds
            return
        process = task.process
        if process.dead:
            raise Killed
        until = self.now + seconds
        if not self._events or self._events[0][0] > until:
            self.now = until  # nobody else has anything to do before
        else:
            self._push(task, seconds)
            self._others(task)
        if process.dead or process.paused_until > self.now:
            self._rest(task)

    def is_idle_for(self, seconds: float) -> bool:
        """Whether nothing else happens within `seconds`."""
        return not self._events or self._events[0][0] > self.now + seconds

    def park(self) -> None:
        """Stops the task that calls until `wake`."""
        task = getcurrent()
        assert isinstance(task, Task)
        if task.process.dead:
            raise Killed
        task.turn += 1
        self._others(task)
        self._rest(task)

    def wake(self, task: Task) -> None:
        """Lets a task go on, wherever it waits."""
        if not task.dead:
            self._push(task, 0.0)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._events:
            if (task := self._next()) is not None:
                task.switch()

    def _others(self, task: Task) -> None:
        """Lets others do what comes first, until it is the turn of this task, which calls."""
        while self._events:
            if (other := self._next()) is not None:
                # Straight from task to task: a way over the hub costs two switches.
                if other is not task:
                    other.switch()
                return
        self._hub.switch()  # nobody will wake this task any more

    def _next(self) -> Task | None:
        """Takes the first event and does it; returns the task whose turn it is, if it is one's."""
        time, _, what, turn = heappop(self._events)
        if turn < 0:
            self.now = max(self.now, time)
            what()
            return None
        if what.turn != turn or what.dead:
            return None
        self.now = max(self.now, time)
        return what  # type: ignore[no-any-return]  # the queue holds tasks and callables

    def _push(self, task: Task, seconds: float) -> None:
        task.turn += 1
        self._count += 1
        heappush(self._events, (self.now + seconds, self._count, task, task.turn))

    def _rest(self, task: Task) -> None:
        process = task.process
        while not process.dead and process.paused_until > self.now:
            self._push(task, process.paused_until - self.now)
            self._others(task)
        if process.dead:
            raise Killed


class Threads:
    """Stands for the module `threading` in the product: locks, events and threads of simulated processes."""

    @staticmethod
    def Lock() -> Lock:  # noqa: N802
        return Lock()

    @staticmethod
    def Event() -> Event:  # noqa: N802
        return Event()

    @staticmethod
    def Thread(*, target: Callable[[], None], name: str, daemon: bool) -> Thread:  # noqa: N802
        return Thread(target)


class Lock:
    """threading.Lock, as a context manager."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: list[Task] = []

    def __enter__(self) -> None:
        while self._taken:
            task = getcurrent()
            self._waiting.append(task)
            task.process.world.park()
        self._taken = True

    def __exit__(self, *_: object) -> None:
        self._taken = False
        if self._waiting:
            task = self._waiting.pop(0)
            task.process.world.wake(task)


class Event:
    """threading.Event."""

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Task] = []

    def wait(self, seconds: float) -> bool:
        if not self._is_set:
            task = getcurrent()
            self._waiting.append(task)
            task.process.world.wait(seconds)
            self._waiting.remove(task)
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        for task in self._waiting:
            task.process.world.wake(task)


class Thread:
    """threading.Thread: one more task of the process that starts it."""

    def __init__(self, target: Callable[[], None]) -> None:
        self._target = target
        self._task: Task | None = None
        self._waiting: list[Task] = []

    def start(self) -> None:
        process = getcurrent().process

        def run() -> None:
            try:
                self._target()
            finally:
                for task in self._waiting:
                    process.world.wake(task)

        self._task = process.world.start(process, run)

    def join(self) -> None:
        assert self._task is not None
        if not self._task.dead:
            task = getcurrent()
            self._waiting.append(task)
            task.process.world.park()
