"""Runs with as many workers as there is room for, within limits.

Ray Train starts any number between the two, and starts the group anew with another one when nodes go or come. What is
learnt does not depend on it: a global batch is cut into as many parts as the most workers have micro batches, and fewer
workers take more parts each. So the parts must divide by every number of workers that may come.
"""

from __future__ import annotations

import math


def objection(fewest: int | None, most: int, micro_batches: int) -> str | None:
    """Why these limits will not do; None if they will, or if there is no lower one."""
    if fewest is None:
        return None
    if fewest > most:
        return f"at least {fewest} workers are more than at most {most}; lower min_count or raise count"
    parts = most * micro_batches
    uneven = [count for count in range(fewest, most + 1) if parts % count]
    if not uneven:
        return None
    shared = math.lcm(*range(fewest, most + 1))
    return (
        f"{most} workers x {micro_batches} micro batches make {parts} parts of a batch, which {uneven[0]} workers "
        f"cannot share evenly; take micro_batches: {shared // math.gcd(shared, most)} or a multiple of it, or another "
        "min_count"
    )
