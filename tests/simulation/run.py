"""Runs histories, or one history step by step.

python -m simulation.run --seeds 100000 --processes 2
python -m simulation.run --seed 123 --trace
python -m simulation.run --bug commit_before_pack --seeds 10000
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from simulation.history import PROFILES, History, Outcome, simulated
from simulation.planted import BUGS, planted

AT_ONCE = 50


@dataclass(kw_only=True)
class Summary:
    """What came of many histories."""

    seeds: int = 0
    failed: list[Outcome] = field(default_factory=list)
    stats: Counter[str] = field(default_factory=Counter)


def run_seed(seed: int, profile: str = "all", *, trace: bool = False) -> Outcome:
    """One history."""
    return History(seed, PROFILES[profile], trace=trace).run()


@contextmanager
def collected_at_the_end() -> Iterator[None]:
    """Python looks for garbage once, after the block, and only among what the block has made."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.enable()
        gc.unfreeze()


def run_seeds(
    seeds: Sequence[int],
    *,
    profile: str = "all",
    bug: str | None = None,
    parquet: bool = False,
    stop: bool = False,
) -> Summary:
    """Many histories in this process; with `stop` up to the first that fails. `parquet`: with the real one."""
    summary = Summary()
    with simulated(parquet=parquet), planted(bug), collected_at_the_end():
        for seed in seeds:
            outcome = run_seed(seed, profile)
            summary.seeds += 1
            summary.stats.update(outcome.stats)
            if outcome.failed:
                summary.failed.append(outcome)
                if stop:
                    break
    return summary


def run_many(
    seeds: Sequence[int],
    *,
    processes: int,
    profile: str = "all",
    bug: str | None = None,
    parquet: bool = False,
    stop: bool = False,
) -> Iterator[Summary]:
    """`run_seeds` in several processes, AT_ONCE at a time, in order."""
    work = partial(run_seeds, profile=profile, bug=bug, parquet=parquet, stop=stop)
    parts = [seeds[start : start + AT_ONCE] for start in range(0, len(seeds), AT_ONCE)]
    if processes == 1:
        yield from map(work, parts)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(work, parts)


def first_failure(bug: str, seeds: Sequence[int], **options: bool | int | str) -> Outcome | None:
    """The first history that finds a planted bug."""
    processes = int(options.pop("processes", 1))
    for summary in run_many(seeds, processes=processes, bug=bug, stop=True, **options):  # type: ignore[arg-type]  # checked by run_many
        if summary.failed:
            return summary.failed[0]
    return None


def describe(outcome: Outcome, profile: str = "all", bug: str | None = None) -> str:
    """What a failing history showed, and how to see it again."""
    again = f"PYTHONPATH=.:platform:tests python -m simulation.run --trace --seed {outcome.seed}"
    again += f" --profile {profile}" if profile != "all" else ""
    again += f" --bug {bug}" if bug else ""
    found = [*outcome.violations, *outcome.errors]
    return "\n    ".join(
        [f"seed {outcome.seed}, see it with: {again}", *(one[:400] for one in found[:5])]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="simulated histories of the feature cache")
    parser.add_argument("--seed", type=int, help="one history only")
    parser.add_argument("--trace", action="store_true", help="print the history, with --seed")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--profile", default="all", choices=sorted(PROFILES))
    parser.add_argument(
        "--bug", choices=[*BUGS, "every"], help="plant a bug, and stop when it is found"
    )
    parser.add_argument("--parquet", action="store_true", help="with real parquet files")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        with simulated(parquet=options.parquet), planted(options.bug):
            outcome = run_seed(options.seed, options.profile, trace=options.trace)
        print(*outcome.trace, describe(outcome, options.profile, options.bug), sep="\n")
        return outcome.failed
    seeds = range(options.start, options.start + options.seeds)
    common = {
        "processes": options.processes,
        "profile": options.profile,
        "parquet": options.parquet,
    }
    if options.bug:
        missed = []
        for bug in BUGS if options.bug == "every" else [options.bug]:
            found = first_failure(bug, seeds, **common)
            told = describe(found, options.profile, bug) if found else "NOT FOUND"
            print(f"{bug}: {told}", flush=True)
            missed += [] if found else [bug]
        return bool(missed)
    started, done, failed = time.monotonic(), 0, 0
    stats: Counter[str] = Counter()
    for summary in run_many(seeds, **common):
        done += summary.seeds
        failed += len(summary.failed)
        stats.update(summary.stats)
        for outcome in summary.failed:
            print(describe(outcome, options.profile), flush=True)
    spent_s = time.monotonic() - started
    print(f"{done} histories, {failed} failed, {spent_s:.0f} s, {done / spent_s:.0f} a second")
    print(", ".join(f"{what}: {number}" for what, number in sorted(stats.items())))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
