"""A train job over clips that do not exist: samples, and random features in a cache, as a preprocess job leaves them.

Lengths differ, some samples draw masks, two samples share each clip. Every byte depends on numbers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crab.encoders.config import TINY_SELECT_LAYERS
from crab.samples import MaskRef, Sample, write_samples
from crab.tasks.mask_answer import MaskItem, format_mask_answer
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestRow, write_manifest
from crab_platform.identity import FeatureKey
from crab_platform.packs import new_entry
from crab_platform.storage import open_store
from jobs.data import load_dataset
from jobs.presets import crab_model_config
from jobs.recipe import CrabRecipe
from jobs.spec import DataSource, Model, TrainSpec, parse_spec

TASKS = ("ave", "avqa", "s4")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A train spec, its manifest, and where an adapter would go."""

    spec: TrainSpec
    manifest: Manifest
    adapter: Path

    def recipe(self) -> CrabRecipe:
        return CrabRecipe(self.spec, self.manifest, self.adapter, {})


def write_job(
    folder: Path,
    cache_url: str,
    *,
    count: int = 24,
    grid: int = 4,
    features: FeatureCache | None = None,
    workers: dict[str, Any] | None = None,
    **optimisation: Any,
) -> Job:
    """Writes `count` samples into `folder` and their features into a cache.

    Args:
        grid: a frame has so many encoder tokens squared.
        features: a cache that opens `cache_url` with settings of its own.
        workers, optimisation: what is set in these parts of the spec.
    """  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    samples = [_sample(folder, number) for number in range(count)]
    path = str(write_samples(folder / "samples.jsonl", samples))
    dataset = load_dataset(DataSource(name="random", samples=path), {})
    cache = features or FeatureCache(open_store(cache_url), pack_bytes=4 << 20)
    named = [(source.name, stream) for source in dataset.sources for stream in source.streams]
    keys = [_key(number, stream) for number, (_, stream) in enumerate(named)]
    entries = cache.commit(
        [
            new_entry(key, _arrays(number, stream, grid))
            for number, ((_, stream), key) in enumerate(zip(named, keys, strict=True))
        ]
    )
    rows = [
        ManifestRow(
            source=name,
            stream=stream,
            status="ready",
            media_sha256=key.media_sha256,
            entry=entry,
        )
        for (name, stream), key, entry in zip(named, keys, entries, strict=True)
    ]
    manifest = write_manifest(cache.store, rows)
    spec = parse_spec(
        {
            "job": "train",
            "name": "random",
            "runs": str(folder / "runs"),
            "data": [{"name": "random", "samples": path}],
            "features": {"cache": cache_url, "manifest": manifest.digest},
            "tasks": list(TASKS),
            "optimisation": {"steps": 6, "batch_size": 8, "learning_rate": 1e-3} | optimisation,
            "workers": {"count": 2, "micro_batches": 2} | (workers or {}),
            "parse_rate_samples": 0,
        }
    )
    assert isinstance(spec, TrainSpec)
    return Job(spec=spec, manifest=manifest, adapter=folder / "adapter")


def _sample(folder: Path, number: int) -> Sample:
    task = TASKS[number % len(TASKS)]
    values: dict[str, Any] = {
        "id": f"random-{number}",
        "task": task,
        "split": "train",
        "clip": f"clip-{number // 2}",
        "video": f"clip-{number // 2}.mp4",
        "instruction": "What happens?" + " Say more." * (number % 7),
        "reasoning": "A red circle rises. " * (number % 5),
        "answer": "<answer> red circle </answer>",
        "label": {},
    }
    if task == "s4":
        pixels = np.zeros((32, 32), np.uint8)
        pixels[4:20, number % 8 : 16] = 1
        file = folder / f"mask-{number}.png"
        Image.fromarray(pixels).save(file)
        item = MaskItem(start_s=0, end_s=1, names=("red circle",))
        values |= {
            "reasoning": "",
            "answer": format_mask_answer([item]),
            "masks": [MaskRef(frame=0, file=str(file))],
        }
    return Sample.model_validate(values)


def _key(number: int, stream: str) -> FeatureKey:
    return FeatureKey(
        media_sha256=f"{number:064x}",
        stream=stream,
        sampling={"made": "up"},
        decode={"made": "up"},
        encoder={"made": "up"},
        dtype="float16",
    )


def _arrays(number: int, stream: str, grid: int) -> dict[str, np.ndarray]:
    config = crab_model_config(Model(preset="tiny"))
    random = np.random.default_rng(number)
    draw = partial(random.standard_normal, dtype=np.float32)
    if stream == "audio":
        shape = (1 + number % 10, 8, config.audio.feature_size)
        return {config.audio.layer: draw(shape)}
    shape = (1 + number % 10, grid * grid, config.video.feature_size)
    return {f"layer_{layer}": draw(shape) for layer in TINY_SELECT_LAYERS}
