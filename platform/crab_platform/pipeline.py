"""Clips to cached features: look up, decode the misses, encode, commit, and say what happened to every clip.

    sources -> [known by version? then its key is known] -> hit: done, no file is opened
            -> Ray Data: read once + hash + look up -> decode -> encode -> commit -> one small row a stream

The cache is the only state. An encode task takes as many clips as fill one pack, and returns its rows after the
commit; a task that dies is run again by Ray and a job that dies is started again by a person: either way only what was
not committed is redone. No feature and no frame travels to the driver.

Where CPUs are scarce, decoding and encoding run *fused* in one actor (nothing but rows leaves it); where decode cores
are plentiful they are *split*: tasks decode, actors encode, one array a stream between them. `docs/log.md` has the
measurements. This file knows nothing of the model: decoders and encoders come in as callables.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.data

from crab_platform import source as media
from crab_platform.cache import CacheIndex, FeatureCache
from crab_platform.catalog import Manifest, write_manifest
from crab_platform.storage import open_store
from crab_platform.transit import Row, row_from_json
from crab_platform.work import Source, Work
from crab_platform.worker import EncodeActor, decode_task


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job did. Counts are of streams of files, since that is what an entry of the cache holds."""

    files: int
    hits: int
    encoded: int
    set_aside: Mapping[str, int]
    decoded_files: int
    media_bytes_read: int
    feature_bytes_written: int
    seconds: Mapping[str, float]
    """Busy seconds by stage, added over all workers, and the wall time of the whole."""
    manifest: str


OnProgress = Callable[[int, int], None]
"""(files done, files in all)."""


def preprocess(
    work: Work, sources: Sequence[Source], on_progress: OnProgress | None = None
) -> tuple[Manifest, Summary]:
    """Brings the features of all sources into the cache and writes the manifest of what there is.

    Files that cannot be read, decoded or have no such stream stand in the manifest as set aside, with their reason.

    Raises:
        ValueError: two sources of one name, or a stream that `work` does not say how to encode.
        StoreUnreachable: the cache cannot be reached.
    """
    _check(work, sources)
    started = time.perf_counter()
    report = on_progress or (lambda done, total: None)
    cache = FeatureCache(open_store(work.cache_url))
    index = cache.index()
    rows, rest = _known(work, sources, index)
    done = len(sources) - len(rest)
    report(done, len(sources))
    looked_up = time.perf_counter() - started
    seconds: defaultdict[str, float] = defaultdict(float)
    media_bytes = decoded = 0
    if rest:
        for row in _stream(work, rest, index):
            rows.append(row)
            for stage, spent in row.seconds.items():
                seconds[stage] += spent
            media_bytes += row.media_bytes
            decoded += row.decoded
            done += row.last_of_file
            report(done, len(sources))
    names = {source.name: (source.name, *source.aliases) for source in sources}
    manifest = write_manifest(
        cache.store, [row.manifest_row(name) for row in rows for name in names[row.name]]
    )
    seconds["look up"] += looked_up
    seconds["wall"] = time.perf_counter() - started
    return manifest, Summary(
        files=len(sources),
        hits=sum(row.status == "hit" for row in rows),
        encoded=sum(row.status == "encoded" for row in rows),
        set_aside=dict(Counter(row.reason for row in rows if row.status == "set_aside")),
        decoded_files=decoded,
        media_bytes_read=media_bytes,
        feature_bytes_written=sum(
            row.entry.length for row in rows if row.entry and row.status == "encoded"
        ),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        manifest=manifest.digest,
    )


def _check(work: Work, sources: Sequence[Source]) -> None:
    names = Counter(name for s in sources for name in (s.name, *s.aliases))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} source names stand twice, the first: {sorted(twice)[:3]}")
    for source in sources:
        unknown = set(source.streams) - set(work.streams)
        if unknown:
            raise ValueError(
                f"source {source.name} wants the streams {sorted(unknown)}; "
                f"this job knows {sorted(work.streams)}"
            )


def _known(
    work: Work, sources: Sequence[Source], index: CacheIndex
) -> tuple[list[Row], list[Source]]:
    """Rows of the sources whose every stream is in the cache by what is known without opening a file; the rest."""
    version_of = media.versions([source.url for source in sources])
    rows: list[Row] = []
    rest: list[Source] = []
    for source in sources:
        version = version_of[source.url]
        sha256 = index.known_media(source.url, version) if version else None
        keys = {s: work.key(s, sha256).digest for s in source.streams} if sha256 else {}
        found = index.lookup(keys.values())
        if sha256 is None or len(found) < len(set(keys.values())):
            rest.append(source)
            continue
        rows += [
            Row(
                name=source.name,
                stream=stream,
                status="hit",
                key=key,
                media_sha256=sha256,
                entry=found[key],
            )
            for stream, key in keys.items()
        ]
    return rows, rest


def _stream(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
    """The Ray Data graph over files that must be opened; rows as their packs are committed."""
    config = work.config
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = False
    # Once into the object store; every worker of a node maps the same copy. In a tuple, because Ray would otherwise
    # fetch it for the actor's constructor and warn that a restart depends on it; we hold it until the end.
    shared_index = (ray.put(index),)
    heads = [{"head": json.dumps([s.name, s.url, list(s.streams)])} for s in sources]
    per_task = config.clips_per_pack if config.mode == "fused" else config.clips_per_decode
    actors = min(config.encode_actors, len(sources))
    blocks = -(-len(heads) // per_task)
    dataset: ray.data.Dataset = ray.data.from_items(heads, override_num_blocks=blocks)
    if config.mode == "split":
        dataset = dataset.map_batches(
            partial(decode_task, work=work, index=shared_index),
            batch_size=config.clips_per_decode,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=config.decode_tasks),
            num_cpus=1,
        )
    dataset = dataset.map_batches(
        EncodeActor,
        batch_size=config.clips_per_pack,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs={"work": work, "index": shared_index},
        num_cpus=config.encode_cpus,
        num_gpus=config.encode_gpus or None,
    )
    block: Any
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for text in block.column("row").to_pylist():
            yield row_from_json(text)
