"""Samples with their cached features, as training and evaluation read them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from crab.model.collate import Example
from crab.samples import Sample
from crab_platform.catalog import Manifest, read_manifest
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import Array
from crab_platform.storage import open_store
from jobs.caches import open_cache
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
        return read_manifest(open_store(features.cache.url), digest)
    except FileNotFoundError as error:
        raise SpecError(
            f"features: the cache {features.cache.url} has no manifest {digest}; was it made in another cache?"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Usable:
    """The samples of a split, by what can be done with them."""

    items: list[Item]
    """Those that have a label and features."""
    with_label: list[Sample]
    """Those that have a label, with features or without, in the order of the data."""
    no_features: dict[str, list[str]]
    """Reason -> ids of those that have a label, but whose media are missing or set aside."""
    no_label: dict[str, list[str]]
    """Reason -> ids of those that can neither be learnt from nor scored."""

    @property
    def left_out(self) -> dict[str, int]:
        """How many there are of each reason."""
        return {reason: len(found) for reason, found in (self.no_features | self.no_label).items()}


def usable(
    datasets: Sequence[Dataset], manifest: Manifest, tasks: Sequence[str], split: str
) -> Usable:
    """The samples of a split that belong to `tasks`. Raises SpecError when none has label and features."""
    items: list[Item] = []
    with_label: list[Sample] = []
    no_features: defaultdict[str, list[str]] = defaultdict(list)
    no_label: defaultdict[str, list[str]] = defaultdict(list)
    exists = cache(os.path.exists)  # samples of one clip share their mask files
    for dataset in datasets:
        for sample_id, reason in dataset.without_label.items():
            no_label[f"label: {reason}"].append(sample_id)
        for sample in dataset.samples:
            if sample.split != split or sample.task not in tasks:
                continue
            if (lack := _lacks_label(sample, exists)) is not None:
                no_label[lack].append(sample.id)
                continue
            with_label.append(sample)
            rows = [(ref, manifest.row(ref.source, ref.stream)) for ref in dataset.media[sample.id]]
            present = tuple(ref for ref, row in rows if row.status == "ready")
            lost = [row.reason for _, row in rows if row.reason and row.reason not in _SILENT]
            if lost or not present:
                no_features[lost[0] if lost else "no_stream"].append(sample.id)
            else:
                items.append(Item(sample=sample, media=present))
    found = Usable(
        items=items,
        with_label=with_label,
        no_features=dict(no_features),
        no_label=dict(no_label),
    )
    if not items:
        raise SpecError(
            f"no {split} sample of the tasks {', '.join(tasks)} has a label, and features in manifest "
            f"{manifest.digest[:12]} (left out: {found.left_out or 'none, the data has no such sample'})"
        )
    return found


def _lacks_label(sample: Sample, exists: Callable[[str], bool]) -> str | None:
    """Why a sample cannot be learnt from or scored."""
    if "weak" in sample.label:
        return "weak_label"  # events without times, as the train split of LLP has them
    if not all("://" in mask.file or exists(mask.file) for mask in sample.masks):
        return "mask_not_found"
    return None


LayersOf = Callable[[Sample], Mapping[str, Sequence[str]]]
"""Sample -> stream -> the encoder's outputs that the model reads of it; Collator.layers is one."""


class FeatureReader:
    """Reads the features of samples through the manifest; keeps only the layers that the model reads."""

    def __init__(self, features: Features, manifest: Manifest, layers: LayersOf) -> None:
        self._reader = ManifestReader(open_cache(features.cache), manifest)
        self._layers = layers

    def examples(self, items: Sequence[Item]) -> list[Example]:
        """The samples with their features; a clip that several of them share is read once."""
        wanted = list(dict.fromkeys((r.source, r.stream) for item in items for r in item.media))
        found = dict(zip(wanted, self._reader.read(wanted), strict=True))
        examples = []
        for item in items:
            layers = self._layers(item.sample)
            features: dict[str, dict[str, Array]] = {}
            for ref in item.media:
                stream, arrays = ref.stream.partition(":")[0], found[ref.source, ref.stream]
                # One that is not in the cache is named by the collator.
                features[stream] = {name: arrays[name] for name in layers[stream] if name in arrays}
            examples.append(Example(sample=item.sample, features=features))
        return examples
