"""Create-only over a network that loses answers: one loop, whatever is on the other side.

The trap is the lost answer. Our upload arrives, the reply does not, and the next attempt is told
that the file exists; some servers and the proxies before them even send a request twice by
themselves, so that the first answer we see is already the refusal of our own copy. So a refusal is
a conflict only when the file that is there is not the one that we wrote.
"""

from __future__ import annotations

from collections.abc import Callable

from crab_platform.clock import Clock
from crab_platform.storage import AlreadyExists, StoreUnreachable

MIN_TRIES = 3
"""So often at least, whatever the budget: a large upload that stalls spends it in one attempt."""

STALE_S = 1800.0
"""Nothing is sent so long after the first attempt: a machine that slept in between would make a commit exist whose pack
garbage collection has taken for an orphan by now."""

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 8.0


class Taken(Exception):  # noqa: N818 (named after the condition, as AlreadyExists)
    """A file of that name exists: perhaps from an attempt of our own."""


class Transient(Exception):  # noqa: N818
    """No answer, or one that says to come again. What was asked may have been done or not."""


def create_with_retries(
    put: Callable[[], None],
    holds: Callable[[], bool],
    *,
    clock: Clock,
    budget_s: float,
    what: str,
    advice: str = "",
) -> None:
    """Call `put` until it has succeeded, or until it is known that it cannot.

    `put` raises Taken or Transient, and anything else goes through as it is. `holds` says whether
    the file that is there was written by one of these very `put`s; it may raise Transient too.
    Pauses grow and are random, so that many writers do not come back together.

    Raises AlreadyExists for somebody else's file, and StoreUnreachable when `budget_s` seconds and
    MIN_TRIES attempts are over; then the file may exist or not. `what` and `advice` are for the
    messages.
    """
    started = clock.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            put()
            return
        except Taken as taken:
            trouble = _ours(holds, taken, what)
            if trouble is None:
                return
        except Transient as error:
            trouble = error
        longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (attempt - 1))
        pause_s = 0.05 + clock.random() * (longest_s - 0.05)
        spent_s = clock.monotonic() - started
        if attempt >= MIN_TRIES and spent_s + pause_s > budget_s:
            raise StoreUnreachable(
                f"{what}: not written after {attempt} attempts in {spent_s:.0f} s ({trouble})"
                f"{'; ' if advice else ''}{advice}"
            ) from trouble
        clock.sleep(pause_s)
        if clock.monotonic() - started > STALE_S:
            raise StoreUnreachable(
                f"{what}: not written in {clock.monotonic() - started:.0f} s ({trouble}); was this machine asleep?"
            ) from trouble


def _ours(holds: Callable[[], bool], taken: Taken, what: str) -> Transient | None:
    """None when the file in the way is ours, the trouble when that cannot be known now."""
    try:
        if holds():
            return None
    except Transient as error:
        return error
    raise AlreadyExists(f"{what} exists already and is never overwritten") from taken
