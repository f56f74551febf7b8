"""Cached features become an adapter: `crab run SPEC` with `job: train`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crab import train as schedule
from crab.evaluate import get_task
from crab.model.artifact import save_model
from crab.model.build import build_model
from crab.model.collate import Collator
from crab.model.llm import load_tokenizer
from crab_platform import ray_cluster, tracking
from crab_platform.catalog import Manifest
from crab_platform.identity import digest
from crab_platform.training import Recipe, TrainingConfig, train
from jobs.data import load_dataset
from jobs.features import FeatureReader, Item, open_manifest, usable
from jobs.output import RESULT, console, line, progress, read_result, table, write_result
from jobs.presets import crab_model_config, llm_digest
from jobs.spec import SpecError, TrainSpec, spec_digest, spec_record

_PLACEMENT = ("name", "runs", "tracking", "workers", "features")


def run(spec: TrainSpec) -> dict[str, Any]:
    """Trains, exports, and returns result.json of the run. A run that is complete is not done again."""
    manifest = open_manifest(spec.features, spec.runs)
    model = crab_model_config(spec.model)
    # What is learnt: the spec without its placement, the features, and the model as it is resolved.
    if model.llm.path is None:
        raise SpecError("model.llm: training needs the folder of a language model")
    base = llm_digest(model.llm.path)
    meant = spec.model_copy(update={"model": spec.model.model_copy(update={"llm": base})})
    identity = digest({"spec": spec_digest(meant, _PLACEMENT), "manifest": manifest.digest})
    finished = read_result(spec.folder)
    if finished is not None and finished.get("identity") == identity:
        if Path(finished["adapter"]).is_dir():
            line(f"{spec.name}: trained already, nothing to do. Adapter: {finished['adapter']}")
            return finished
    datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
    items, left_out = usable(datasets, manifest, spec.tasks, "train")
    _check_answers(items)
    console.print(
        f"{spec.name}: {len(items)} train samples"
        + (f", left out for want of features: {dict(left_out)}" if left_out else "")
    )
    folder = spec.folder / identity[:12]
    adapter = folder / "adapter"
    config = TrainingConfig(
        name="ray",
        storage_path=str(folder),
        num_workers=spec.workers.count,
        cpus_per_worker=spec.workers.cpus,
        use_gpu=spec.workers.gpu,
        micro_batches=spec.workers.micro_batches,
        micro_batch_size=_micro_batch_size(spec),
        zero_stage=spec.workers.zero_stage,
        dtype=spec.optimisation.dtype,
        max_grad_norm=spec.optimisation.max_grad_norm,
        weight_decay=spec.optimisation.weight_decay,
        checkpoint_every=spec.workers.checkpoint_every,
        max_failures=spec.workers.max_failures,
    )
    losses: list[float] = []
    with (
        tracking.start_run(
            spec.tracking.uri,
            spec.tracking.experiment,
            spec.name,
            spec=spec_record(spec),
            tags={"identity": identity},
        ) as run_,
        ray_cluster.connected(),
        progress("steps", spec.optimisation.steps) as bar,
    ):
        run_.dataset(spec.name, manifest.digest, f"{spec.features.cache}/{manifest.path}")

        def on_metrics(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            run_.metrics({name: v for name, v in metrics.items() if name != "step"}, step)
            losses.append(metrics["loss"])
            bar(step, spec.optimisation.steps)

        lineage = {
            "manifest": manifest.digest,
            "base_model": base,
            "identity": identity,
            "mlflow_run": run_.run_id,
        }
        build: Callable[[], Recipe] = partial(_build, spec, manifest, str(adapter), lineage)
        trained = train(build, config, on_metrics)
        run_.file(adapter, "adapter")
        result = {
            "job": spec.job,
            "name": spec.name,
            "identity": identity,
            "manifest": manifest.digest,
            "adapter": str(adapter),
            "mlflow_run": run_.run_id,
            "first_loss": losses[0] if losses else None,
            "metrics": trained.metrics,
        }
        write_result(spec.folder, result)
        run_.file(spec.folder / RESULT)
    table(spec.name, ("last step", "value"), sorted(trained.metrics.items()))
    line(f"adapter: {adapter}")
    return result


def _check_answers(items: Sequence[Item]) -> None:
    """A model that is shown answers which its task cannot read would learn to be scored as wrong."""
    wrong = []
    for item in items:
        task = get_task(item.sample.task)
        if task.parse(task.target(item.sample)) is None:
            wrong.append(item.sample)
    if wrong:
        raise SpecError(
            f"{len(wrong)} train samples have an answer that task {wrong[0].task!r} cannot read, the first is "
            f"{wrong[0].id!r}: {wrong[0].answer!r}. crab/tasks/{wrong[0].task}.py states the grammar"
        )


def _micro_batch_size(spec: TrainSpec) -> int:
    parts = spec.workers.count * spec.workers.micro_batches
    if spec.optimisation.batch_size % parts:
        raise SpecError(
            f"optimisation.batch_size {spec.optimisation.batch_size} does not divide by workers.count x "
            f"workers.micro_batches = {parts}; change one of them"
        )
    return spec.optimisation.batch_size // parts


def _build(
    spec: TrainSpec, manifest: Manifest, adapter: str, lineage: Mapping[str, Any]
) -> CrabRecipe:
    return CrabRecipe(spec, manifest, Path(adapter), lineage)


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
        self.model: torch.nn.Module = self._crab
        self.num_steps = spec.optimisation.steps
        self._collate = Collator(config, self._tokenizer, self._crab.table)
        datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
        self._items, self.left_out = usable(datasets, manifest, spec.tasks, "train")
        layers = {
            "video": config.video.layer,
            "image": config.video.layer,
            "audio": config.audio.layer,
        }
        self._reader = FeatureReader(spec.features, manifest, layers)
        self._target_tokens = [self._collate.num_target_tokens(item.sample) for item in self._items]
        self._tasks = sorted(spec.tasks)
        self._micro_batch_size = _micro_batch_size(spec)

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
        values = self._spec.optimisation
        indices = schedule.batch_indices(values.seed, step, values.batch_size, len(self._items))
        normalizer = float(sum(self._target_tokens[index] for index in indices))
        mine = schedule.rank_slice(indices, rank, world_size)
        for part in schedule.micro_batches(mine, self._micro_batch_size):
            items = [self._items[index] for index in part]
            batch = self._collate(self._reader.examples(items))
            yield {
                "tensors": batch,
                "tasks": [item.sample.task for item in items],
                "normalizer": normalizer,
            }

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = self._crab.new_embedding.rows.device
        tensors = {name: tensor.to(device) for name, tensor in batch["tensors"].items()}
        output = model(tensors, batch["normalizer"])
        sums: dict[str, torch.Tensor] = {}
        for task in self._tasks:
            chosen = torch.tensor([name == task for name in batch["tasks"]], device=device)
            sums[f"nats/{task}"] = (output["sample_loss"] * chosen).sum()
            sums[f"tokens/{task}"] = (output["sample_tokens"] * chosen).sum()
        return output["loss"], sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        tokens = {task: sums[f"tokens/{task}"] for task in self._tasks}
        by_task = {f"loss/{t}": sums[f"nats/{t}"] / n for t, n in tokens.items() if n}
        return by_task | {"supervised_tokens": sum(tokens.values())}

    def seed(self, step: int, micro: int, rank: int) -> int:
        parts = self._spec.workers.micro_batches
        position = (rank * parts + micro) * self._micro_batch_size
        return schedule.step_seed(self._spec.optimisation.seed, step, position)

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        # A folder from an attempt that died after its export and before the job's end.
        shutil.rmtree(self._adapter, ignore_errors=True)
        lineage = self._lineage | {
            "step": step,
            "preset": self._spec.model.preset,
            "llm_given": self._spec.model.llm,
        }
        save_model(self._crab, self._tokenizer, self._adapter, state=state, lineage=lineage)
