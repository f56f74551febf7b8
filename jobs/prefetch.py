"""Batches that a thread makes ready while the ones before them are learnt from.

The thread runs ahead over the ends of steps, in the order of the steps. What it makes depends on the step alone, so a
run with prefetch learns what a run without it learns. It is a daemon and is told to stop when the process ends:
it keeps no process alive.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Part = TypeVar("Part")
Made = TypeVar("Made")

_LOG = logging.getLogger(__name__)
_END_S = 5.0
"""How long the end of the process waits for the thread: one that reads from a store which hangs is left behind."""


class _StoppedError(Exception):
    """Nobody wants what the thread would make."""


@dataclass(frozen=True, kw_only=True)
class _Item(Generic[Made]):
    made: Made | None = None
    error: BaseException | None = None
    """What happened in place of `made`."""
    is_last: bool = False
    """Of its step."""


class _Line(Generic[Made]):
    """A queue of at most `limit` items from one thread to another, which can be stopped."""

    def __init__(self, limit: int) -> None:
        self._items: deque[_Item[Made]] = deque()
        self._limit = limit
        self._is_stopped = False
        self._changed = threading.Condition()

    def put(self, item: _Item[Made]) -> None:
        """Waits for room. Raises _StoppedError."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or len(self._items) < self._limit)
            if self._is_stopped:
                raise _StoppedError
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> _Item[Made]:
        """Waits for an item."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


class Prefetch(Generic[Part, Made]):
    """The batches of every step, made ahead of time."""

    def __init__(
        self,
        parts: Callable[[int], Sequence[Part]],
        make: Callable[[Sequence[Part]], Iterable[Made]],
        *,
        num_steps: int,
        ahead: int,
    ) -> None:
        """
        Args:
            parts: step -> what its batches are made of, one each; a function of the step alone. Called in the thread.
            make: several parts -> their batches in the same order. Called in the thread with the next `ahead` parts
                together, so that what they need is read at once.
            ahead: so many batches wait to be asked for, and so many more are being made; 0: no thread, each is made
                when it is asked for.
        """
        self._parts, self._make = parts, make
        self._num_steps, self._ahead = num_steps, ahead
        self._line: _Line[Made] | None = None
        self._end: Callable[[], object] | None = None
        self._next: int | None = None
        """The step whose first batch comes next out of the thread."""

    def step(self, step: int) -> Iterator[Made]:
        """The batches of a step. Any step can be asked for; the next one is ready the soonest.

        Raises whatever making a batch raised, in that batch's place; the step can then be asked for again.
        """
        if not 0 <= step < self._num_steps:
            raise ValueError(f"there are batches of the steps 0..{self._num_steps - 1}, not {step}")
        if self._ahead == 0:
            for part in self._parts(step):
                yield from self._make([part])
            return
        if self._line is None or self._next != step:
            self._start(step)
        assert self._line is not None
        # Until the step is through: whoever stops in the middle gets a new thread.
        self._next = None
        is_last = False
        while not is_last:
            item = self._line.get()
            if item.error is not None:
                self.close()
                raise item.error
            assert item.made is not None
            yield item.made
            is_last = item.is_last
        self._next = step + 1

    def close(self) -> None:
        """Ends the thread, if there is one. Batches can still be asked for; that starts another."""
        if self._end is not None:
            self._end()
        self._line = self._end = self._next = None

    def _start(self, step: int) -> None:
        self.close()
        line: _Line[Made] = _Line(self._ahead)
        thread = threading.Thread(
            target=_fill,
            args=(line, self._parts, self._make, range(step, self._num_steps), self._ahead),
            name="prefetch",
            daemon=True,
        )
        # Also called when the process ends, before daemons are cut off wherever they are.
        self._line, self._end = line, weakref.finalize(self, _stop, line, thread)
        thread.start()


def _stop(line: _Line[Made], thread: threading.Thread) -> None:
    line.stop()
    if thread is not threading.current_thread():
        thread.join(_END_S)


def _fill(
    line: _Line[Made],
    parts: Callable[[int], Sequence[Part]],
    make: Callable[[Sequence[Part]], Iterable[Made]],
    steps: range,
    ahead: int,
) -> None:
    """What the thread does."""
    try:
        for group in _groups(parts, steps, ahead):
            for made, (_, is_last) in zip(_each(make, group), group, strict=True):
                line.put(_Item(made=made, is_last=is_last))
    except _StoppedError:
        return
    except BaseException as error:  # raised where the batch is asked for
        try:
            line.put(_Item(error=error))
        except _StoppedError:
            _LOG.warning("a batch that nobody asked for could not be made: %s", error)


def _groups(
    parts: Callable[[int], Sequence[Part]], steps: range, size: int
) -> Iterator[list[tuple[Part, bool]]]:
    """(part, is it the last of its step) of step after step, `size` at a time. An error comes after those before it."""
    group: list[tuple[Part, bool]] = []
    try:
        for step in steps:
            found = parts(step)
            for number, part in enumerate(found, 1):
                group.append((part, number == len(found)))
                if len(group) == size:
                    yield group
                    group = []
    except Exception:  # raised again, after the parts before it
        yield group
        raise
    yield group


def _each(
    make: Callable[[Sequence[Part]], Iterable[Made]], group: Sequence[tuple[Part, bool]]
) -> Iterator[Made]:
    """The batches of a group. One that cannot be made does not take those before it along."""
    parts = [part for part, _ in group]
    if not parts:
        return
    num_made = 0
    try:
        for made in make(parts):
            yield made
            num_made += 1
    except Exception as error:  # told, and raised again below by the batch that it belongs to
        if len(parts) == 1:
            raise
        _LOG.warning("%d batches could not be read at once, now one by one: %s", len(parts), error)
        for part in parts[num_made:]:
            yield from make([part])
