"""Preprocess jobs over cheap clips with encoders of a few thousand weights: specs, and runs of them without Ray.

`run_here` is the product's own job but for Ray: leases, index, decode, encode, commit in packs, settle, manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from support.cheap_clips import SAMPLING
from support.tiny_encoders import hearing_folder, vision_folder

from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest
from crab_platform.clock import Clock
from crab_platform.commits import Writer
from crab_platform.index import CacheIndex
from crab_platform.pipeline import Summary, preprocess
from crab_platform.transit import Row, row_from_json
from crab_platform.work import Decoder, Source, Work
from crab_platform.worker import EncodeActor, decode_task, source_to_head
from jobs.audit import decode_here
from jobs.caches import open_cache
from jobs.data import load_dataset, merge_sources
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec, parse_spec

DAY_S = 86400.0


@dataclass
class Later(Clock):
    """A clock that is ahead of the others by so many seconds; waits take no time, and put it further ahead."""

    ahead_s: float = 0.0
    naps: list[float] = field(default_factory=list)

    def time_ns(self) -> int:
        return super().time_ns() + int(self.ahead_s * 1e9)

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead_s

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.ahead_s += seconds


@dataclass(frozen=True)
class Encoders:
    """Folders of two tiny encoders; the second time they are found, not made."""

    folder: Path

    def record(self, *, layers: Sequence[int] = (2,), seed: int = 0) -> dict[str, Any]:
        """For `encoders:` of a spec. `seed` makes other weights."""
        vision, hearing = self.folder / f"vision-{seed}", self.folder / f"hearing-{seed}"
        if not vision.exists():
            vision_folder(vision, seed=seed)
            hearing_folder(hearing, seed=seed)
        return {
            "video": {
                "kind": "clip",
                "path": str(vision),
                "select_layers": list(layers),
                "device": "cpu",
            },
            "audio": {"kind": "beats", "path": str(hearing), "device": "cpu"},
        }


def spec_record(
    clips: Path, cache: str | dict[str, Any], encoders: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    """A preprocess spec over a folder of cheap clips."""
    return {
        "job": "preprocess",
        "name": "small",
        "data": [{"name": "clips", "files": str(clips)}],
        "cache": cache,
        "sampling": dict(SAMPLING),
        "encoders": encoders,
        "pipeline": {"clips_per_pack": 4, "encode_cpus": 0.5},
        **changes,
    }


def parse(record: dict[str, Any]) -> PreprocessSpec:
    spec = parse_spec(record)
    assert isinstance(spec, PreprocessSpec)
    return spec


def sources_of(spec: PreprocessSpec) -> list[Source]:
    datasets = [load_dataset(source, spec.sampling.tasks) for source in spec.data]
    return merge_sources(source for dataset in datasets for source in dataset.sources)


def stream_here(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
    """What Ray's workers do, one pack after the other in this process."""
    actor = EncodeActor(work, index)
    config = work.config
    for start in range(0, len(sources), config.clips_per_pack):
        batch = sources[start : start + config.clips_per_pack]
        table = pa.table({"head": [source_to_head(source) for source in batch]})
        if config.mode == "split":
            table = pa.concat_tables(decode_task(table, work, index))
        for text in actor(table).column("row").to_pylist():
            yield row_from_json(text)


def run_here(
    record: dict[str, Any],
    *,
    decoder: Decoder | None = decode_here,
    change: Callable[[FeatureCache], FeatureCache] | None = None,
    stream: Callable[..., Iterator[Row]] = stream_here,
) -> tuple[Manifest, Summary]:
    """Runs a preprocess spec. `decoder` None: the decode pool of the product, with its children."""
    spec = parse(record)
    work = build_work(spec)
    writer = Writer(run="", experiment=spec.tracking.experiment, team=spec.cache.team)

    def opened() -> FeatureCache:
        cache = open_cache(spec.cache, writer)
        return change(cache) if change else cache

    work = replace(work, open_cache=opened)
    if decoder is not None:
        work = replace(work, make_decoder=lambda: decoder)
    return preprocess(work, sources_of(spec), stream=stream)


def at(clock: Clock) -> Callable[[FeatureCache], FeatureCache]:
    """For `change`: the same cache with another clock."""

    def change(cache: FeatureCache) -> FeatureCache:
        cache.clock = clock
        return cache

    return change
