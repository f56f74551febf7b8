"""B9: a store 20 ms away. Ours keeps enough requests in flight; what do others make of it?

    python benchmarks/cache_latency.py [--samples 2000] [--latency-ms 20] [--repeats 3] [--no-peers]

One asyncio process answers every request after 20 ms, so the bound is the smaller of what our requests in flight could
carry (in flight * size / latency) and what raw sockets, as many as those, get out of the server in the same run. Ours
is timed with its index loaded, which a job does once (a handful of requests one after the other).
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import readers
from cache_data import SAMPLE_BYTES, Site, build, digest_of
from cache_read import PACKAGES
from measure import Contender, Goals, disagreeing, header, show, take_turns, versions
from servers import latency_server

from crab_platform.ranges import PIECE_BYTES
from crab_platform.storage import IN_FLIGHT, SMALL_AT_ONCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("work/bench/read"))
    args = parser.parse_args()
    work = args.work.absolute()
    build(work / "root", args.samples, peers=not args.no_peers)
    goals = Goals()
    latency_s = args.latency_ms / 1e3
    with latency_server(work / "root", latency_s) as endpoint:
        site = Site(endpoint, str(work / "root"), args.samples)
        order = list(range(args.samples))
        in_flight = min(IN_FLIGHT, -(-args.samples * SAMPLE_BYTES // PIECE_BYTES))
        contenders = [
            Contender("raw sockets, 8 MiB ranges").start(
                readers.open_raw, site, (in_flight, PIECE_BYTES)
            ),
            Contender("ours").start(readers.open_ours, site, (args.samples, False)),
        ]
        if not args.no_peers:
            contenders += [
                Contender("pyarrow parquet").start(readers.open_pyarrow_parquet, site),
                Contender("lance scan").start(readers.open_lance, site, 0),
            ]
        header(f"B9: {args.latency_ms:.0f} ms a request, {args.samples} samples in order")
        print(f"   {versions(*PACKAGES)}")
        _judge(goals, contenders, order, args.repeats, in_flight * PIECE_BYTES / latency_s / 1e6)

        random.Random(0).shuffle(order)
        in_flight = min(IN_FLIGHT * SMALL_AT_ONCE, args.batch)
        contenders = [
            Contender("raw sockets, 48 KiB ranges").start(readers.open_raw, site, (in_flight, 0)),
            Contender(f"ours, {args.batch} a call").start(
                readers.open_ours, site, (args.batch, False)
            ),
        ]
        if not args.no_peers:
            contenders += [
                Contender("lance take").start(readers.open_lance, site, args.batch),
                Contender("s3fs, an object a sample").start(readers.open_s3fs, site, args.batch),
                Contender("boto3, an object a sample").start(readers.open_boto3, site),
                Contender("pyarrow, an object a sample").start(readers.open_pyarrow_objects, site),
            ]
        header(f"B9: {args.latency_ms:.0f} ms a request, {args.samples} samples in random order")
        _judge(goals, contenders, order, args.repeats, in_flight * SAMPLE_BYTES / latency_s / 1e6)
    return 1 if goals.failed else 0


def _judge(
    goals: Goals, contenders: list[Contender], order: list[int], repeats: int, carried_mbs: float
) -> None:
    take_turns(contenders, order, repeats)
    show(contenders)
    for contender in contenders:
        contender.stop()
        if contender.error:
            goals.broken(f"{contender.name} failed")
    if any(c.error for c in contenders):
        return
    if wrong := disagreeing(contenders, digest_of(order)):
        goals.broken(f"{', '.join(wrong)} read something else: no ratios")
        return
    ceiling = contenders[0].best_mbs
    bound = min(carried_mbs, ceiling)
    print(f"   bound: {bound:.0f} MB/s (in flight {carried_mbs:.0f}, raw sockets {ceiling:.0f})")
    goals.check("ours / bound (best)", contenders[1].best_mbs / bound, 0.9)
    for peer in contenders[2:]:
        print(
            f"       {peer.name} / bound: {peer.best_mbs / bound:.2f} (best), "
            f"{peer.median_mbs / bound:.2f} (median)"
        )


if __name__ == "__main__":
    sys.exit(main())
