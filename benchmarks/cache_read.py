"""B7: the whole hit path of our cache against a raw-socket ceiling and other libraries, over nginx on loopback.

    python benchmarks/cache_read.py [--samples 4000] [--repeats 5] [--batch 256] [--no-peers]

4,000 samples of 48 KiB, in order and in random order. Ours is timed from nothing: list and load the index, look up,
read, check every digest, give numpy arrays; in order also with the index loaded before, and by the store alone, which
checks nothing. The ceiling only moves bytes into memory that it has already; beside it stands the same with BLAKE3
over each sample, which is the limit of whoever checks. All that was
read is hashed after the clock stopped, and no ratio is printed unless everybody read the same.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import readers
from cache_data import Site, build, digest_of
from measure import Contender, Goals, disagreeing, header, show, take_turns, versions
from servers import nginx

PACKAGES = (
    *("obstore", "s3fs", "aiobotocore", "boto3", "pyarrow", "pylance", "webdataset"),
    *("safetensors", "blake3", "numpy"),
)
RANGE_BYTES = 8 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256, help="samples a call of read, random")
    parser.add_argument("--connections", type=int, default=4, help="of the ceiling")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("work/bench/read"))
    args = parser.parse_args()
    work = args.work.absolute()
    build(work / "root", args.samples, peers=not args.no_peers)
    goals = Goals()
    with nginx(work / "root", work / "nginx") as endpoint:
        site = Site(endpoint, str(work / "root"), args.samples)
        order = list(range(args.samples))
        in_turn = [
            Contender("raw sockets, 8 MiB ranges").start(
                readers.open_raw, site, (args.connections, RANGE_BYTES)
            ),
            Contender("ours, the whole hit path").start(readers.open_ours, site, (1024, True)),
            Contender("ours, index loaded before").start(readers.open_ours, site, (1024, False)),
            Contender("our store, 8 MiB ranges").start(readers.open_ours_ranges, site, RANGE_BYTES),
            Contender("raw sockets, 8 MiB ranges, and BLAKE3").start(
                readers.open_raw_checked, site, (args.connections, RANGE_BYTES)
            ),
        ]
        slow = []
        if not args.no_peers:
            in_turn += [
                Contender("safetensors shards, boto3").start(readers.open_safetensors, site),
                Contender("pyarrow parquet").start(readers.open_pyarrow_parquet, site),
                Contender("lance scan").start(readers.open_lance, site, 0),
                Contender("webdataset").start(readers.open_webdataset, site),
            ]
            slow = _per_object(site, args.batch)
        header(f"B7: {args.samples} samples of 48 KiB in order")
        print(f"   {versions(*PACKAGES)}; nginx on loopback, LIST by a Python server behind it")
        _race(goals, in_turn, slow, order, args.repeats)
        if not goals.failed:
            _goal(goals, "8 MiB ranges, our store / raw sockets", in_turn[3], in_turn[0], 0.85)
            _goal(goals, "in order, ours / raw sockets", in_turn[1], in_turn[0], 0.85)
            _goal(
                goals,
                "in order, ours without the index / raw sockets",
                in_turn[2],
                in_turn[0],
                0.85,
            )
            for peer in in_turn[4:] + slow:  # raw sockets that check first
                wanted = 40.0 if peer.name.startswith("s3fs") else None
                _goal(goals, f"in order, ours / {peer.name}", in_turn[1], peer, wanted)
        _stop(in_turn + slow)

        random.Random(0).shuffle(order)
        scattered = [
            Contender("raw sockets, 48 KiB ranges").start(
                readers.open_raw, site, (args.connections, 0)
            ),
            Contender(f"ours, {args.batch} a call").start(
                readers.open_ours, site, (args.batch, True)
            ),
            Contender("ours, 64 a call").start(readers.open_ours, site, (64, True)),
            Contender("ours, all in one call").start(readers.open_ours, site, (args.samples, True)),
        ]
        slow = []
        if not args.no_peers:
            scattered.append(Contender("lance take").start(readers.open_lance, site, args.batch))
            slow = _per_object(site, args.batch)
        header(f"B7: {args.samples} samples of 48 KiB in random order")
        print(
            "   parquet, tar and whole-shard safetensors have no cheap random read and stand above"
        )
        broken = goals.failed
        goals.failed = False
        _race(goals, scattered, slow, order, args.repeats)
        if not goals.failed:
            _goal(goals, "random, ours / raw sockets", scattered[1], scattered[0], 0.5)
            for peer in scattered[4:] + slow:
                _goal(goals, f"random, ours / {peer.name}", scattered[1], peer, None)
        goals.failed |= broken
        _stop(scattered + slow)
    return 1 if goals.failed else 0


def _per_object(site: Site, batch: int) -> list[Contender]:
    return [
        Contender("s3fs, an object a sample").start(readers.open_s3fs, site, batch),
        Contender("boto3, an object a sample").start(readers.open_boto3, site),
        Contender("pyarrow, an object a sample").start(readers.open_pyarrow_objects, site),
    ]


def _race(
    goals: Goals, fast: list[Contender], slow: list[Contender], order: list[int], repeats: int
) -> None:
    """All in turns; those that take seconds a pass have fewer of them."""
    take_turns(fast + slow, order, 2)
    take_turns(fast, order, max(repeats - 2, 0))
    show(fast + slow)
    for contender in fast + slow:
        if contender.error:
            goals.broken(f"{contender.name} failed")
    if wrong := disagreeing(fast + slow, digest_of(order)):
        goals.broken(f"{', '.join(wrong)} read something else: no ratios")


def _goal(goals: Goals, what: str, ours: Contender, other: Contender, wanted: float | None) -> None:
    best, median = ours.best_mbs / other.best_mbs, ours.median_mbs / other.median_mbs
    if wanted is None:
        print(f"       {what}: {best:.2f} (best), {median:.2f} (median)")
    else:
        goals.check(f"{what} (best; median {median:.2f})", best, wanted)


def _stop(contenders: list[Contender]) -> None:
    for contender in contenders:
        contender.stop()


if __name__ == "__main__":
    sys.exit(main())
