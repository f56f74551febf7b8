"""Which samples a train job learns from, which it is validated on, and which it asks at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crab_platform.catalog import Manifest
from crab_platform.identity import digest
from jobs.data import Dataset, load_dataset, samples_digest
from jobs.features import Item, usable
from jobs.spec import TrainSpec


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The samples of a run. The same in every process: a function of the spec, the data and the manifest."""

    items: list[Item]
    """What is learnt from."""
    probes: list[Item]
    """What is asked at the end, and never learnt from."""
    held_out: list[Item]
    """What the validation loss is measured on, and never learnt from; may be the same."""
    left_out: dict[str, int]
    """How many could not be used, by reason."""


def choose(spec: TrainSpec, manifest: Manifest) -> Chosen:
    """The samples of a train job, those that it asks at its end, and those that it is validated on."""
    datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
    num_held_out = spec.validation.samples_per_task if spec.validation else 0
    return choose_items(datasets, manifest, spec.tasks, spec.parse_rate_samples, num_held_out)


def choose_items(
    datasets: Sequence[Dataset],
    manifest: Manifest,
    tasks: Sequence[str],
    num_probes: int,
    num_held_out: int = 0,
) -> Chosen:
    """The train samples that have label and features, less up to `num_probes` of each task that are only asked, and up
    to `num_held_out` that are only measured; the same ones as far as they go.

    Those come from the split val where it has the task; else they are the last train samples, a tenth at most.
    """
    wanted = max(num_probes, num_held_out)
    found = usable(datasets, manifest, tasks, "train")
    has_val = any(s.split == "val" and s.task in tasks for d in datasets for s in d.samples)
    val = usable(datasets, manifest, tasks, "val").items if wanted and has_val else []
    val_of, train_of = _by_task(val), _by_task(found.items)
    probes: list[Item] = []
    held_out: list[Item] = []
    aside: set[str] = set()
    for task, items in train_of.items():
        tail = items[len(items) - min(wanted, len(items) // 10) :]
        # Of two numbers the smaller one means some of the same samples.
        for chosen, count in ((probes, num_probes), (held_out, num_held_out)):
            chosen += val_of[task][:count] if task in val_of else tail[max(0, len(tail) - count) :]
        aside |= {item.sample.id for item in tail} if task not in val_of else set()
    return Chosen(
        items=[item for item in found.items if item.sample.id not in aside],
        probes=probes,
        held_out=held_out,
        left_out=found.left_out,
    )


def _by_task(items: Sequence[Item]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.sample.task, []).append(item)
    return groups


def data_digest(manifest: Manifest, items: Sequence[Item]) -> str:
    """What is learnt from: the features by their manifest, and what is asked and answered."""
    return digest(
        {"manifest": manifest.digest, "samples": samples_digest(item.sample for item in items)}
    )
