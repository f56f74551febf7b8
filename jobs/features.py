"""Samples with their cached features, as training and evaluation read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crab.model.collate import Example
from crab.samples import Sample
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestReader, read_manifest
from crab_platform.packs import Array
from crab_platform.storage import open_store
from jobs.data import Dataset, MediaRef
from jobs.output import finished_jobs, read_result
from jobs.spec import Features, SpecError

_SILENT = ("no_audio_stream", "no_video_stream")
"""Set aside for good reason: the clip has no such stream, and the prompt then leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sample and where its features stand in the manifest."""

    sample: Sample
    media: tuple[MediaRef, ...]


def open_manifest(features: Features, runs: str) -> Manifest:
    """The manifest of a spec, by digest or by the name of the preprocess job that made it last."""
    name = features.manifest
    if len(name) == 64 and set(name) <= set("0123456789abcdef"):
        digest = name
    else:
        result = read_result(Path(runs) / name)
        if result is None or "manifest" not in result:
            raise SpecError(
                f"features.manifest: there is no finished preprocess job {name!r} in {runs} "
                f"({finished_jobs(Path(runs), 'manifest', name)}); run it first, or give a manifest's digest"
            )
        digest = str(result["manifest"])
    try:
        return read_manifest(open_store(features.cache), digest)
    except FileNotFoundError as error:
        raise SpecError(
            f"features: the cache {features.cache} has no manifest {digest}; was it made in another cache?"
        ) from error


def usable(
    datasets: Sequence[Dataset], manifest: Manifest, tasks: Sequence[str], split: str
) -> tuple[list[Item], Counter[str]]:
    """(samples of the split that have features, why the others are left out).

    Raises SpecError when none is left.
    """
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    for dataset in datasets:
        for sample in dataset.samples:
            if sample.split != split or sample.task not in tasks:
                continue
            rows = [(ref, manifest.row(ref.source, ref.stream)) for ref in dataset.media[sample.id]]
            present = tuple(ref for ref, row in rows if row.status == "ready")
            lost = [row.reason for _, row in rows if row.reason and row.reason not in _SILENT]
            if lost or not present:
                left_out[lost[0] if lost else "no_stream"] += 1
            else:
                items.append(Item(sample=sample, media=present))
    if not items:
        raise SpecError(
            f"no {split} sample of the tasks {list(tasks)} has features in manifest {manifest.digest[:12]} "
            f"(left out: {dict(left_out)})"
        )
    return items, left_out


class FeatureReader:
    """Reads the features of samples through the manifest; keeps only the layers that the model reads."""

    def __init__(self, features: Features, manifest: Manifest, layers: dict[str, str]) -> None:
        """`layers`: stream -> name of the encoder output that is kept."""
        self._reader = ManifestReader(FeatureCache(open_store(features.cache)), manifest)
        self._layers = layers

    def examples(self, items: Sequence[Item]) -> list[Example]:
        """The samples with their features; a clip that several of them share is read once."""
        wanted = list(dict.fromkeys((r.source, r.stream) for item in items for r in item.media))
        found = dict(zip(wanted, self._reader.read(wanted), strict=True))
        examples = []
        for item in items:
            features: dict[str, dict[str, Array]] = {}
            for ref in item.media:
                stream = ref.stream.partition(":")[0]
                layer = self._layers[stream]
                features[stream] = {layer: found[ref.source, ref.stream][layer]}
            examples.append(Example(sample=item.sample, features=features))
        return examples
