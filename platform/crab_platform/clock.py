"""Time, pauses, chance and names, in one object that can be replaced.

Code that waits, expires or picks names takes a `Clock`. The product gives it `SYSTEM`; a simulation
gives its own, with clocks that disagree and names that repeat with the seed.
"""

from __future__ import annotations

import random
import secrets
import time

_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock:
    """This machine's clock and its source of chance."""

    def time_ns(self) -> int:
        """Nanoseconds since 1970 as this machine believes; two machines may be minutes apart."""
        return time.time_ns()

    def monotonic(self) -> float:
        """Seconds from some fixed moment; never goes back, and goes on while a laptop sleeps, where the system can.

        A lease that ran out while its holder slept must not look fresh to it.
        """
        return time.clock_gettime(_STEADY)

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)

    def new_id(self) -> str:
        """A name nobody else picks, and which sorts by time: nanoseconds, then 64 random bits."""
        return f"{self.time_ns():016x}-{secrets.token_hex(8)}"

    def random(self) -> float:
        """A number in [0, 1), for spreading out those who wait."""
        return random.random()


SYSTEM = Clock()
