"""What a train job learns from and how: Crab as `crab_platform.training` runs it."""

from __future__ import annotations

import itertools
import math
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
from crab.model.build import bare_llm, build_model
from crab.model.collate import Collator
from crab.model.config import CrabConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import load_tokenizer
from crab.model.recompute import recompute_activations
from crab.model.sequences import num_tokens
from crab_platform.catalog import Manifest
from jobs.chosen import choose, data_digest
from jobs.features import FeatureReader, Item
from jobs.partition import parts_of_equal_sum, parts_of_equal_work
from jobs.prefetch import Prefetch
from jobs.presets import crab_model_config
from jobs.spec import SpecError, TrainSpec

_SAMPLE_WORK = 100
"""What the projectors cost for one clip, in positions of the language model (tiny preset, CPU: 17 ms and 0.17 ms)."""
_MASK_FRAME_WORK = 75
"""What the mask decoder costs for one frame, likewise (13 ms). In a large model both are less, and parts less even."""


def micro_batch_size(spec: TrainSpec) -> int:
    """Samples of one worker at a time. Raises SpecError where the batch cannot be cut evenly."""
    parts = spec.workers.count * spec.workers.micro_batches
    if spec.optimisation.batch_size % parts:
        raise SpecError(
            f"optimisation.batch_size {spec.optimisation.batch_size} does not divide by workers.count x "
            f"workers.micro_batches = {parts}; change one of them"
        )
    return spec.optimisation.batch_size // parts


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Samples and what of them does not depend on the step."""

    items: list[Item]
    tasks: list[str]
    target_tokens: list[int]
    mask_frames: list[int]
    lengths: list[int]
    """Positions in the language model, without the few of the prompt's template."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one micro batch is made of."""

    items: list[Item]
    normalizers: tuple[float, float]
    """Supervised tokens and drawn frames of the global batch, so that the losses of its parts add up."""
    looks: bool
    """Whether the routers are looked at."""


def _asked(spec: TrainSpec, manifest: Manifest, config: CrabConfig) -> tuple[Any, ...]:
    """All that the samples of a recipe and their lengths depend on."""
    said = spec.data, spec.features, spec.tasks, spec.validation, spec.parse_rate_samples
    return said, manifest.digest, config.model_dump(exclude={"adapter"})


class CrabRecipe:
    """Crab as `crab_platform.training` runs it: model, batches and losses of every step."""

    def __init__(
        self,
        spec: TrainSpec,
        manifest: Manifest,
        adapter: Path,
        lineage: Mapping[str, Any],
        kept: CrabRecipe | None = None,
    ) -> None:
        """`kept` is a recipe that is done with: its language model and its samples are taken over where they are the
        same, which saves reading them again. Without ZeRO only, which leaves weights as they were."""
        config = crab_model_config(spec.model)
        assert config.llm.path is not None
        self._spec, self._adapter, self._lineage = spec, adapter, dict(lineage)
        self._tokenizer = load_tokenizer(config.llm.path)
        same_llm = kept is not None and kept._crab.config.llm == config.llm
        llm = bare_llm(kept._crab) if kept is not None and same_llm else None
        self._crab: CrabModel = build_model(config, self._tokenizer, llm)
        if spec.workers.activation_checkpointing:
            recompute_activations(self._crab)
        self._has_routers = health.has_choice(self._crab)
        self.model: torch.nn.Module = self._crab
        self.num_steps = spec.optimisation.steps
        self._collate = Collator(config, self._tokenizer, self._crab.table)
        self._asked = _asked(spec, manifest, config)
        if kept is not None and kept._asked == self._asked:
            self._train: _Samples = kept._train
            self._held_out: _Samples = kept._held_out
            self.data: str = kept.data
        else:
            chosen = choose(spec, manifest)
            self._train = self._samples(chosen.items, manifest)
            self._held_out = self._samples(chosen.held_out, manifest)
            self.data = data_digest(manifest, chosen.items)
        self._reader = FeatureReader(spec.features, manifest, self._collate.layers)
        self._tasks = sorted(set(self._train.tasks))
        self._packs = spec.optimisation.batches == "packed"
        self._prefetch: Prefetch[_Part, dict[str, Any]] | None = None
        self._place: tuple[int, int] | None = None

    def _samples(self, items: Sequence[Item], manifest: Manifest) -> _Samples:
        target_tokens = [self._collate.num_target_tokens(item.sample) for item in items]
        return _Samples(
            items=list(items),
            tasks=[item.sample.task for item in items],
            target_tokens=target_tokens,
            mask_frames=[self._collate.num_mask_frames(item.sample) for item in items],
            lengths=[
                self._length(item, tokens, manifest)
                for item, tokens in zip(items, target_tokens, strict=True)
            ],
        )

    def _length(self, item: Item, target_tokens: int, manifest: Manifest) -> int:
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
        # Not of the workers that there are: they may be fewer than the spec's, and learn the same.
        num_parts = self._spec.workers.count * self._spec.workers.micro_batches
        parts = self._cut(self._train, self._indices(step), num_parts, looks=self._looks(step))
        return parts[rank::world_size]

    def _cut(
        self, samples: _Samples, indices: list[int], num_parts: int, *, looks: bool
    ) -> list[_Part]:
        """The samples of these numbers in parts of nearly equal work."""
        normalizers = (
            float(sum(samples.target_tokens[index] for index in indices)),
            float(sum(samples.mask_frames[index] for index in indices)),
        )
        indices = sorted(indices, key=lambda index: samples.lengths[index])
        lengths = [samples.lengths[index] for index in indices]
        extras = [_SAMPLE_WORK + _MASK_FRAME_WORK * samples.mask_frames[index] for index in indices]
        if self._packs:
            works = [length + extra for length, extra in zip(lengths, extras, strict=True)]
            parts = [[indices[n] for n in part] for part in parts_of_equal_sum(works, num_parts)]
        else:
            parts = [indices[part] for part in parts_of_equal_work(lengths, extras, num_parts)]
        return [
            _Part(
                items=[samples.items[index] for index in part],
                normalizers=normalizers,
                looks=looks,
            )
            for part in parts
        ]

    def validation_batches(self, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        count = len(self._held_out.items)
        if count < world_size:
            raise SpecError(
                f"{count} samples are held out for validation, fewer than the {world_size} workers that share them: "
                "raise validation.samples_per_task, or give more data (a tenth of a task's samples at most is held out)"
            )
        # As large as in training, and as many on every rank.
        rounds = min(
            math.ceil(count / (world_size * micro_batch_size(self._spec))), count // world_size
        )
        parts = self._cut(self._held_out, list(range(count)), rounds * world_size, looks=False)
        for part in parts[rank::world_size]:
            yield from self._batches([part])

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
            return schedule.batch_indices(
                values.seed, step, values.batch_size, len(self._train.items)
            )
        weights = None
        if not isinstance(values.sampling, str):
            weights = {task: values.sampling.get(task, 1.0) for task in self._tasks}
        return schedule.balanced_indices(
            values.seed, step, values.batch_size, self._train.tasks, weights
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
