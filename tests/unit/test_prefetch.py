"""What a thread makes ahead of time comes in order, errors in their place, and the thread ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from jobs.prefetch import Prefetch

ROOT = Path(__file__).parents[2]
NUM_STEPS = 7
PATIENCE_S = 60.0
"""After which a wait is given up; nothing here takes a second."""


def parts(step: int) -> list[str]:
    """One to three a step."""
    return [f"{step}.{micro}" for micro in range(1 + step % 3)]


def make(found: Sequence[str]) -> Iterator[str]:
    for part in found:
        yield f"batch {part}"


def prefetch(
    ahead: int,
    *,
    parts: Callable[[int], Sequence[str]] = parts,
    make: Callable[[Sequence[str]], Iterator[str]] = make,
    kind: type[Prefetch] = Prefetch,
) -> Prefetch[str, str]:
    return kind(parts, make, num_steps=NUM_STEPS, ahead=ahead)


def expected(step: int) -> list[str]:
    return list(make(parts(step)))


def assert_in_order(made: Prefetch[str, str]) -> None:
    for step in range(NUM_STEPS):
        assert list(made.step(step)) == expected(step)


@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 20])
def test_batches_come_in_order(ahead: int) -> None:
    assert_in_order(prefetch(ahead))


class MixesUp(Prefetch):
    """Planted bug: as if two threads had made the batches."""

    def step(self, step: int) -> Iterator[str]:
        yield from reversed(list(super().step(step)))


class IsOneStepAhead(Prefetch):
    """Planted bug: gives what comes out of the thread next, whatever was asked for."""

    def step(self, step: int) -> Iterator[str]:
        self._next = step if self._next is not None else None
        yield from super().step(step)


class Swallows(Prefetch):
    """Planted bug: a batch that cannot be made is left out."""

    def step(self, step: int) -> Iterator[str]:
        try:
            yield from super().step(step)
        except OSError:
            return


def test_batches_out_of_order_would_be_found() -> None:
    with pytest.raises(AssertionError):
        assert_in_order(prefetch(2, kind=MixesUp))


def assert_jumps(made: Prefetch[str, str]) -> None:
    for step in (0, 1, 4, 5, 2, 3, 3, 6, 0):
        assert list(made.step(step)) == expected(step)
    made.close()


@pytest.mark.parametrize("ahead", [0, 1, 2, 20])
def test_any_step_can_be_asked_for(ahead: int) -> None:
    """A run goes on at its checkpoint."""
    assert_jumps(prefetch(ahead))


def test_a_jump_that_is_not_noticed_would_be_found() -> None:
    with pytest.raises(AssertionError):
        assert_jumps(prefetch(2, kind=IsOneStepAhead))


def test_a_step_that_was_left_in_the_middle_starts_at_its_beginning() -> None:
    made = prefetch(2)
    first = next(iter(made.step(2)))
    assert first == expected(2)[0]
    assert list(made.step(2)) == expected(2)
    assert next(iter(made.step(5))) == expected(5)[0]
    assert list(made.step(6)) == expected(6)


@pytest.mark.parametrize("step", [-1, NUM_STEPS])
def test_steps_that_there_are_not_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.6, not"):
        next(prefetch(2).step(step))


class Broken:
    """Makes batches but for one; `cured` makes it too."""

    def __init__(self, bad: str, *, at_once: bool) -> None:
        self.bad, self.at_once, self.cured = bad, at_once, False

    def make(self, found: Sequence[str]) -> Iterator[str]:
        if self.at_once and self.bad in found and not self.cured:
            raise OSError(f"no {self.bad}")
        for part in found:
            if part == self.bad and not self.cured:
                raise OSError(f"no {part}")
            yield f"batch {part}"


def assert_error_in_its_place(broken: Broken, made: Prefetch[str, str]) -> None:
    """The bad batch is 4.1, the second of two."""
    for step in range(4):
        assert list(made.step(step)) == expected(step)
    flow = made.step(4)
    assert next(flow) == expected(4)[0]
    with pytest.raises(OSError, match=r"no 4\.1"):
        next(flow)
    with pytest.raises(OSError, match=r"no 4\.1"):
        list(made.step(4))
    broken.cured = True
    for step in range(4, NUM_STEPS):
        assert list(made.step(step)) == expected(step)


@pytest.mark.parametrize("at_once", [False, True], ids=["in making one", "in reading several"])
@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 20])
def test_an_error_is_raised_where_its_batch_is_asked_for(ahead: int, at_once: bool) -> None:
    broken = Broken("4.1", at_once=at_once)
    assert_error_in_its_place(broken, prefetch(ahead, make=broken.make))


def test_an_error_that_is_swallowed_would_be_found() -> None:
    broken = Broken("4.1", at_once=False)
    with pytest.raises(StopIteration):
        assert_error_in_its_place(broken, prefetch(2, make=broken.make, kind=Swallows))


def test_an_error_in_planning_a_step_comes_after_the_step_before() -> None:
    def planned(step: int) -> list[str]:
        if step == 3:
            raise LookupError("no step 3")
        return parts(step)

    made = prefetch(20, parts=planned)
    for step in range(3):
        assert list(made.step(step)) == expected(step)
    with pytest.raises(LookupError, match="no step 3"):
        list(made.step(3))


def test_the_thread_runs_ahead_over_the_end_of_a_step_and_no_further_than_it_may() -> None:
    """All that is needed by the next `ahead` batches is read at once."""
    groups: list[list[str]] = []
    num_made = threading.Semaphore(0)

    def make_and_tell(found: Sequence[str]) -> Iterator[str]:
        groups.append(list(found))
        for part in found:
            num_made.release()
            yield f"batch {part}"

    made = prefetch(2, make=make_and_tell)
    assert list(made.step(0)) == expected(0)
    # Of the steps 1 and 2, unasked: two wait, and a third has no room yet.
    for _ in range(4):
        assert num_made.acquire(timeout=PATIENCE_S)
    assert not num_made.acquire(timeout=0.2)
    assert groups == [["0.0", "1.0"], ["1.1", "2.0"]]
    made.close()


def of_prefetch() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_the_thread_ends_with_the_last_step_and_when_closed() -> None:
    made = prefetch(1)
    list(made.step(NUM_STEPS - 1))
    for thread in of_prefetch():
        thread.join(PATIENCE_S)
    assert of_prefetch() == []
    list(made.step(0))
    assert len(of_prefetch()) == 1
    made.close()
    assert of_prefetch() == []


_A_RUN_THAT_FAILS = """
import sys, threading
from jobs.prefetch import Prefetch
def make(found):
    for part in found:
        if part == sys.argv[1]:
            threading.Event().wait()  # a store that never answers
        yield part
made = Prefetch(lambda step: [f"{step}.{m}" for m in range(3)], make, num_steps=1000, ahead=2)
list(made.step(0))
raise RuntimeError("in the middle of step 1")
"""


@pytest.mark.parametrize("hangs_at", ["never", "2.0"])
def test_no_thread_keeps_a_process_that_failed_alive(hangs_at: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _A_RUN_THAT_FAILS, hangs_at],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: in the middle of step 1")
