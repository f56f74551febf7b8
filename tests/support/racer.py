"""Processes that make the features of the same clips at the same moment, each as a job of its own.

    python -m support.racer REQUEST

REQUEST is JSON, a list of races: {"spec": {...}, "processes": 8, "planted": "", "children": true, "out": "FOLDER"}.
One process imports everything and forks before it opens anything, since an import takes seconds. Each child leaves
FOLDER/<n>.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.small_jobs import parse, run_here, sources_of, stream_here

from crab_platform import pipeline
from crab_platform.catalog import Manifest, ManifestRow
from crab_platform.holding import JobHold, publish_manifest
from crab_platform.index import CacheIndex
from crab_platform.packs import Entry
from crab_platform.transit import Row
from crab_platform.work import Source, Work
from jobs.audit import decode_here
from jobs.caches import open_cache

NO_SETTLE = "what a job committed itself counts for it"
LAST_COMMIT = "the last commit of a key counts"


def main() -> None:
    for asked in json.loads(sys.argv[1]):
        race(asked)


def race(asked: dict[str, Any]) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(asked["processes"])
    racers = [fork.Process(target=run, args=(n, asked, barrier)) for n in range(asked["processes"])]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()


def run(number: int, asked: dict[str, Any], barrier: Any) -> None:
    plant(asked["planted"])
    try:
        result: dict[str, Any] = one_job(asked, barrier)
    except BaseException:
        barrier.abort()
        result = {"error": traceback.format_exc()}
    (Path(asked["out"]) / f"{number}.json").write_text(json.dumps(result))
    # Decode children end with their parent; its threads wait for work that never comes.
    os._exit(0)


def one_job(asked: dict[str, Any], barrier: Any) -> dict[str, Any]:
    def stream(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
        barrier.wait()  # every index was loaded: all of them find nothing, and make everything
        yield from stream_here(work, sources, index)
        barrier.wait()  # every commit is written

    given: list[ManifestRow] = []

    def publish(hold: JobHold, rows: Iterable[ManifestRow], **settings: Any) -> Manifest:
        # Watched, because the first manifest of these features stays, whatever others would have put in theirs.
        given.extend(rows)
        return publish_manifest(hold, given, **settings)

    pipeline.publish_manifest = publish
    decoder = None if asked["children"] else decode_here
    manifest, summary = run_here(asked["spec"], decoder=decoder, stream=stream)
    barrier.wait()
    spec = parse(asked["spec"])
    cache = open_cache(spec.cache)
    keys = [row.entry.key for row in manifest.ready() if row.entry]
    seen = cache.index().lookup(keys)
    # As a reader that nothing checks a second time: what it reads is its view.
    cache.read(list(seen.values()))
    assert len(sources_of(spec)) == summary.files
    return {
        "error": "",
        "digest": manifest.digest,
        "encoded": summary.encoded,
        "hits": summary.hits,
        "set_aside": dict(summary.set_aside),
        "in_rows": {row.entry.key: place(row.entry) for row in given if row.entry},
        "in_manifest": {row.entry.key: place(row.entry) for row in manifest.ready() if row.entry},
        "in_index": {key: place(entry) for key, entry in seen.items()},
        "seconds": asdict(summary)["seconds"],
    }


def place(entry: Entry) -> list[Any]:
    return [entry.commit, entry.pack, entry.offset, entry.blake3]


def plant(name: str) -> None:
    if name == NO_SETTLE:
        pipeline._settled = lambda rows, index: list(rows)
    elif name == LAST_COMMIT:

        def lookup(self: CacheIndex, keys: Sequence[str]) -> dict[str, Entry]:
            return {key: copies[-1] for key in keys if (copies := self.copies(key))}

        CacheIndex.lookup = lookup
    elif name:
        raise ValueError(name)


if __name__ == "__main__":
    main()
