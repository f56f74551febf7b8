"""B8, first half: what a hit costs before a byte of features is read. 1,000,000 made-up keys in a real store.

    python benchmarks/cache_lookup.py [--keys 1000000] [--per-commit 1000] [--repeats 3]

Commits are written by the cache's own code; nginx serves them and its access log counts the requests. Each pass loads
the index from nothing and asks for every key, in batches and in random order, as well as for keys that nobody has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from cache_data import BUCKET
from measure import Goals, cpu_s, header, peak_mb, versions
from servers import nginx, requests_in, use_endpoint

BATCH = 10_000


def key_of(number: int) -> str:
    """A made-up key."""
    return hashlib.sha256(number.to_bytes(8, "big")).hexdigest()


def build(root: Path, keys: int, per_commit: int) -> None:
    """Commits of entries whose packs do not exist: nothing of them is read."""
    from crab_platform import commits
    from crab_platform.packs import Entry, NewEntry, TensorSpec
    from crab_platform.storage import FolderStore

    done, wanted = root / "done.json", {"keys": keys, "per_commit": per_commit}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return
    shutil.rmtree(root, ignore_errors=True)
    store = FolderStore(root / BUCKET / "cache")
    specs = (TensorSpec(name="f", dtype="float16", shape=(24, 1024), offset=0),)
    for start in range(0, keys, per_commit):
        pack = commits.pack_path(commits.new_id())
        rows = []
        for number in range(start, min(start + per_commit, keys)):
            key = key_of(number)
            record = {"media_sha256": key, "stream": "video", "dtype": "float16", "schema": 1}
            new = NewEntry(
                key=key,
                record=record,
                arrays={},
                source_url=f"/clips/{number:08d}.mp4",
                source_version=f"1000-{number}",
            )
            entry = Entry(
                key=key,
                pack=pack,
                offset=(number - start) * 49152,
                length=49152,
                blake3=key[::-1],
                tensors=specs,
            )
            rows.append((new, entry))
        path = f"{commits.COMMITS}/{commits.new_id()}.parquet"
        target = root / BUCKET / "cache" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(
            commits.write_commit(rows, commits.Writer())
        )  # without fsync: a thousand of them
    assert store.list(commits.COMMITS)
    done.write_text(json.dumps(wanted))


def measure(pipe: Connection, endpoint: str, keys: int) -> None:
    """In a process of its own: (load s, look-up s, CPU s, found, wrong, found of strangers, peak MB)."""
    use_endpoint(endpoint)
    from crab_platform.cache import FeatureCache
    from crab_platform.storage import open_store

    wanted = [key_of(number) for number in range(keys)]
    random.Random(1).shuffle(wanted)
    strangers = [key_of(number) for number in range(keys, keys + min(keys, 100_000))]
    base = peak_mb()
    cpu, started = cpu_s(), time.perf_counter()
    index = FeatureCache(open_store(f"s3://{BUCKET}/cache")).index()
    loaded = time.perf_counter()
    found = wrong = 0
    spent = 0.0
    for at in range(0, keys, BATCH):
        few = wanted[at : at + BATCH]
        before = time.perf_counter()
        entries = index.lookup(few)
        spent += time.perf_counter() - before
        found += len(entries)
        wrong += sum(entries[key].blake3 != key[::-1] for key in few if key in entries)
    before = time.perf_counter()
    unknown = len(index.lookup(strangers))
    missed = time.perf_counter() - before
    cpu = cpu_s() - cpu
    pipe.send((loaded - started, spent, missed, cpu, found, wrong, unknown, base, peak_mb()))


def one_pass(endpoint: str, keys: int) -> Sequence[float]:
    """`measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=measure, args=(far, endpoint, keys))
    process.start()
    far.close()
    answer: Sequence[float] = near.recv()
    process.join()
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--per-commit", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/bench/lookup"))
    args = parser.parse_args()
    work = args.work.absolute()
    build(work / "root", args.keys, args.per_commit)
    log = work / "access.log"
    goals = Goals()
    runs = []
    for _ in range(args.repeats):
        log.unlink(missing_ok=True)
        with nginx(work / "root", work / "nginx", log=log) as endpoint:
            runs.append(one_pass(endpoint, args.keys))
        requests = requests_in(log)
    num_commits = -(-args.keys // args.per_commit)
    header(f"B8: lookups, {args.keys:,} keys in {num_commits:,} commits, {args.repeats} passes")
    print(f"   {versions('obstore', 'pyarrow')}; batches of {BATCH:,} keys in random order")
    loads, lookups = [run[0] for run in runs], [run[1] for run in runs]
    print(f"   index: {min(loads):.2f} s best, {statistics.median(loads):.2f} s median")
    print(
        f"   look up: {args.keys / min(lookups):,.0f} keys/s best, "
        f"{args.keys / statistics.median(lookups):,.0f} median; keys that nobody has: "
        f"{min(args.keys, 100_000) / min(run[2] for run in runs):,.0f} keys/s; CPU of the whole "
        f"{min(run[3] for run in runs):.1f} s"
    )
    base, peak = runs[-1][7], max(run[8] for run in runs)
    print(
        f"   peak memory {peak:.0f} MB, of which {base:.0f} MB before (Python, the list of keys); "
        f"requests: {dict(requests)}"
    )
    if any(run[4] != args.keys or run[5] or run[6] for run in runs):
        goals.broken("lookups found other entries than were committed")
        return 1
    goals.check("keys a second, best", args.keys / min(lookups), 200_000)
    with_load = args.keys / min(load + spent for load, spent in zip(loads, lookups, strict=True))
    print(f"       with the loading of the index: {with_load:,.0f} keys/s")
    goals.check("HEAD requests", requests["HEAD"], 0, at_most=True)
    goals.check("LIST requests, whatever the number of keys", requests["LIST"], 8, at_most=True)
    goals.check("GET requests", requests["GET"], num_commits + 8, at_most=True)
    return 1 if goals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
