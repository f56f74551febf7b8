"""What a train job learns from and how: Crab as `crab_platform.training` runs it."""

from __future__ import annotations

import heapq
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crab import train as schedule
from crab.adapter import health, record_routing
from crab.model.artifact import save_model
from crab.model.build import build_model
from crab.model.collate import Collator
from crab.model.llm import load_tokenizer
from crab.model.recompute import recompute_activations
from crab.model.sequences import num_tokens
from crab_platform.catalog import Manifest
from crab_platform.identity import digest
from jobs.data import Dataset, load_dataset, samples_digest
from jobs.features import FeatureReader, Item, usable
from jobs.prefetch import Prefetch
from jobs.presets import crab_model_config
from jobs.spec import SpecError, TrainSpec

_SAMPLE_WORK = 100
"""What the projectors cost for one clip, in positions of the language model (tiny preset, CPU: 17 ms and 0.17 ms)."""
_MASK_FRAME_WORK = 75
"""What the mask decoder costs for one frame, likewise (13 ms). In a large model both are less, and parts less even."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The samples of a run. The same in every process: a function of the spec, the data and the manifest."""

    items: list[Item]
    """What is learnt from."""
    probes: list[Item]
    """What is asked at the end, and never learnt from."""
    left_out: dict[str, int]
    """How many could not be used, by reason."""


def choose(spec: TrainSpec, manifest: Manifest) -> Chosen:
    """The samples of a train job, and those that it asks at its end."""
    datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
    return choose_items(datasets, manifest, spec.tasks, spec.parse_rate_samples)


def choose_items(
    datasets: Sequence[Dataset], manifest: Manifest, tasks: Sequence[str], num_probes: int
) -> Chosen:
    """The train samples that have label and features, less up to `num_probes` of each task that are only asked.

    Those come from the split val where it has the task; else they are the last train samples, a tenth at most.
    """
    found = usable(datasets, manifest, tasks, "train")
    has_val = any(s.split == "val" and s.task in tasks for d in datasets for s in d.samples)
    val = usable(datasets, manifest, tasks, "val").items if num_probes and has_val else []
    val_of, train_of = _by_task(val), _by_task(found.items)
    probes: list[Item] = []
    for task, items in train_of.items():
        kept = min(num_probes, len(items) // 10)
        probes += val_of[task][:num_probes] if task in val_of else items[len(items) - kept :]
    aside = {item.sample.id for item in probes}
    return Chosen(
        items=[item for item in found.items if item.sample.id not in aside],
        probes=probes,
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


def micro_batch_size(spec: TrainSpec) -> int:
    """Samples of one worker at a time. Raises SpecError where the batch cannot be cut evenly."""
    parts = spec.workers.count * spec.workers.micro_batches
    if spec.optimisation.batch_size % parts:
        raise SpecError(
            f"optimisation.batch_size {spec.optimisation.batch_size} does not divide by workers.count x "
            f"workers.micro_batches = {parts}; change one of them"
        )
    return spec.optimisation.batch_size // parts


def parts_of_equal_work(
    lengths: Sequence[int], extras: Sequence[int], num_parts: int
) -> list[slice]:
    """Cuts a batch into consecutive parts, none empty, so that the largest work is as small as can be.

    `lengths` ascend. The work of a part is its number of samples times its longest, which the others are padded to, and
    the `extras` of its samples. Where tasks differ in length, parts of equal number would differ twofold, and half of
    the work would be padding. Raises ValueError for more parts than samples.
    """
    count = len(lengths)
    before = [0, *itertools.accumulate(extras)]
    if not 1 <= num_parts <= count:
        raise ValueError(f"{count} samples do not make {num_parts} parts")
    # best[k][n]: the largest work when the first n samples make k parts, and where the last part starts.
    best = [[(0, 0)] + [(lengths[-1] * count + before[-1], 0)] * count]
    for parts in range(1, num_parts + 1):
        row = [(0, 0)] * (count + 1)
        for end in range(parts, count + 1):
            row[end] = min(
                (
                    max(
                        best[parts - 1][start][0],
                        (end - start) * lengths[end - 1] + before[end] - before[start],
                    ),
                    start,
                )
                for start in range(parts - 1, end)
            )
        best.append(row)
    ends, end = [], count
    for parts in range(num_parts, 0, -1):
        ends.append(end)
        end = best[parts][end][1]
    starts = [0, *ends[:0:-1]]
    return [slice(start, end) for start, end in zip(starts, reversed(ends), strict=True)]


def parts_of_equal_sum(works: Sequence[int], num_parts: int) -> list[list[int]]:
    """Numbers of the samples in each of `num_parts` parts, none empty, whose sums of `works` are nearly alike.

    The largest first, each to the part that has least: the largest part has at most a third more than it must
    (R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969). Raises ValueError for more parts than samples.
    """
    if not 1 <= num_parts <= len(works):
        raise ValueError(f"{len(works)} samples do not make {num_parts} parts")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for index in sorted(range(len(works)), key=lambda index: (-works[index], index)):
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + works[index], part))
    return [sorted(part) for part in parts]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one micro batch is made of."""

    items: list[Item]
    normalizers: tuple[float, float]
    """Supervised tokens and drawn frames of the global batch, so that the losses of its parts add up."""
    looks: bool
    """Whether the routers are looked at."""


class CrabRecipe:
    """Crab as `crab_platform.training` runs it: model, batches and losses of every step."""

    def __init__(
        self, spec: TrainSpec, manifest: Manifest, adapter: Path, lineage: Mapping[str, Any]
    ) -> None:
        config = crab_model_config(spec.model)
        assert config.llm.path is not None
        self._spec, self._adapter, self._lineage = spec, adapter, dict(lineage)
        self._tokenizer = load_tokenizer(config.llm.path)
        self._crab = build_model(config, self._tokenizer)
        if spec.workers.activation_checkpointing:
            recompute_activations(self._crab)
        self._has_routers = health.has_choice(self._crab)
        self.model: torch.nn.Module = self._crab
        self.num_steps = spec.optimisation.steps
        self._collate = Collator(config, self._tokenizer, self._crab.table)
        self._items = choose(spec, manifest).items
        self.data = data_digest(manifest, self._items)
        self._reader = FeatureReader(spec.features, manifest, self._collate.layers)
        samples = [item.sample for item in self._items]
        self._target_tokens = [self._collate.num_target_tokens(sample) for sample in samples]
        self._mask_frames = [self._collate.num_mask_frames(sample) for sample in samples]
        self._lengths = [
            self._length(item, tokens, manifest)
            for item, tokens in zip(self._items, self._target_tokens, strict=True)
        ]
        self._task_of = [sample.task for sample in samples]
        self._tasks = sorted(set(self._task_of))
        self._packs = spec.optimisation.batches == "packed"
        self._prefetch: Prefetch[_Part, dict[str, Any]] | None = None
        self._place: tuple[int, int] | None = None

    def _length(self, item: Item, target_tokens: int, manifest: Manifest) -> int:
        """Positions of a sample in the language model, without the few of the prompt's template."""
        positions = target_tokens + len(self._tokenizer(item.sample.instruction)["input_ids"])
        for ref in item.media:
            entry = manifest.row(ref.source, ref.stream).entry
            assert entry is not None
            config = self._crab.config
            projector = config.audio if ref.stream.startswith("audio") else config.video
            positions += entry.tensors[0].shape[0] * projector.num_queries
        return positions

    def parameters(self) -> list[dict[str, Any]]:
        return schedule.parameter_groups(
            self._crab.trainable_parameters(), weight_decay=self._spec.optimisation.weight_decay
        )

    def learning_rate(self, step: int) -> float:
        values = self._spec.optimisation
        return schedule.cosine_lr(
            step, num_steps=values.steps, peak=values.learning_rate, warmup=values.warmup_ratio
        )

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        if self._prefetch is None or self._place != (rank, world_size):
            self.close()
            self._place = (rank, world_size)
            self._prefetch = Prefetch(
                partial(self._parts, rank=rank, world_size=world_size),
                self._batches,
                num_steps=self.num_steps,
                ahead=self._spec.workers.prefetch,
            )
        return self._prefetch.step(step)

    def close(self) -> None:
        """Ends the thread that makes batches ahead. It ends by itself after the last step, or with the process."""
        if self._prefetch is not None:
            self._prefetch.close()

    def _parts(self, step: int, rank: int, world_size: int) -> list[_Part]:
        """This rank's parts of the global batch: all of equal work, as ranks wait for each other in each."""
        indices = self._indices(step)
        normalizers = (
            float(sum(self._target_tokens[index] for index in indices)),
            float(sum(self._mask_frames[index] for index in indices)),
        )
        indices.sort(key=lambda index: self._lengths[index])
        lengths = [self._lengths[index] for index in indices]
        extras = [_SAMPLE_WORK + _MASK_FRAME_WORK * self._mask_frames[index] for index in indices]
        # Not of the workers that there are: they may be fewer than the spec's, and learn the same.
        num_parts = self._spec.workers.count * self._spec.workers.micro_batches
        if self._packs:
            works = [length + extra for length, extra in zip(lengths, extras, strict=True)]
            parts = [[indices[n] for n in part] for part in parts_of_equal_sum(works, num_parts)]
        else:
            parts = [indices[part] for part in parts_of_equal_work(lengths, extras, num_parts)]
        return [
            _Part(
                items=[self._items[index] for index in part],
                normalizers=normalizers,
                looks=self._looks(step),
            )
            for part in parts[rank::world_size]
        ]

    def _batches(self, parts: Sequence[_Part]) -> Iterator[dict[str, Any]]:
        """The batches of several parts, whose features are read at once."""
        examples = iter(self._reader.examples([item for part in parts for item in part.items]))
        for part in parts:
            tensors = self._collate(
                list(itertools.islice(examples, len(part.items))), pack=self._packs
            )
            yield {
                "tensors": tensors,
                "tasks": [item.sample.task for item in part.items],
                "normalizers": part.normalizers,
                "counts": {
                    "tokens": num_tokens(tensors),
                    "positions": tensors["input_ids"].numel(),
                },
                "looks": part.looks,
            }

    def _looks(self, step: int) -> bool:
        """Whether the routers are looked at in this step; the same on every rank."""
        every = self._spec.workers.health_every
        return self._has_routers and every > 0 and (step + 1) % every == 0

    def _indices(self, step: int) -> list[int]:
        """The global batch of a step, as `optimisation.sampling` says."""
        values = self._spec.optimisation
        if values.sampling == "proportional":
            return schedule.batch_indices(values.seed, step, values.batch_size, len(self._items))
        weights = None
        if not isinstance(values.sampling, str):
            weights = {task: values.sampling.get(task, 1.0) for task in self._tasks}
        return schedule.balanced_indices(
            values.seed, step, values.batch_size, self._task_of, weights
        )

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = self._crab.new_embedding.rows.device
        tensors = {name: tensor.to(device) for name, tensor in batch["tensors"].items()}
        # Left before backward, which runs forward again with activation checkpointing.
        looked: AbstractContextManager[dict[str, list[torch.Tensor]]] = (
            record_routing(self._crab) if batch["looks"] else nullcontext({})
        )
        with looked as gates:
            output = model(tensors, *batch["normalizers"])
        sums = health.sums(gates, tensors.get("attention_mask")) if gates else {}
        sums |= {name: torch.tensor(count) for name, count in batch["counts"].items()}
        for task in self._tasks:
            chosen = torch.tensor([name == task for name in batch["tasks"]], device=device)
            sums[f"nats/{task}"] = (output["sample_loss"] * chosen).sum()
            sums[f"tokens/{task}"] = (output["sample_tokens"] * chosen).sum()
            sums[f"mask_nats/{task}"] = (output["sample_mask_loss"] * chosen).sum()
            sums[f"mask_frames/{task}"] = (output["sample_mask_frames"] * chosen).sum()
        return output["loss"], sums

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        found = health.metrics(sums) | {name: sums[name] for name in ("tokens", "positions")}
        found["padding_share"] = 1 - sums["tokens"] / sums["positions"]
        for task in self._tasks:
            if tokens := sums[f"tokens/{task}"]:
                found[f"loss/{task}"] = sums[f"nats/{task}"] / tokens
            if frames := sums[f"mask_frames/{task}"]:
                found[f"mask_loss/{task}"] = sums[f"mask_nats/{task}"] / frames
        found["supervised_tokens"] = sum(sums[f"tokens/{task}"] for task in self._tasks)
        found["mask_frames"] = sum(sums[f"mask_frames/{task}"] for task in self._tasks)
        return found

    def seed(self, step: int, micro: int, rank: int) -> int:
        # The number of its part: the same on one rank and on many.
        assert self._place is not None  # of micro_batches, which this is one of
        part = micro * self._place[1] + rank
        return schedule.step_seed(self._spec.optimisation.seed, step, part)

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        # A folder from an attempt that died after its export and before the job's end.
        shutil.rmtree(self._adapter, ignore_errors=True)
        lineage = self._lineage | {
            "step": step,
            "preset": self._spec.model.preset,
            "llm_given": self._spec.model.llm,
        }
        save_model(self._crab, self._tokenizer, self._adapter, state=state, lineage=lineage)
