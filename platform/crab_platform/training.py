"""Ray Train V2 runs the workers, DeepSpeed ZeRO shards what they hold.

This file knows nothing of the model. A job hands in a *recipe*: a callable that every worker calls once to build
its model and its batches. What is trained must be small next to what is frozen (adapter, projectors), so a
checkpoint holds only trained parameters, their optimizer state and the step: the data order and the dropout of a
step are functions of (seed, step), which makes the step the whole cursor.

Checkpoints are written by DeepSpeed on every rank, merged by Ray Train, and carry a marker of our own that is
written last; DeepSpeed's own `latest` file is published before all ranks are done and is not trusted.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

_LOG = logging.getLogger(__name__)


class Recipe(Protocol):
    """What a worker trains. Built once per worker process, after the process group is up."""

    model: torch.nn.Module
    num_steps: int

    def parameters(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups; only parameters that are trained."""
        ...

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        ...

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Any]:
        """The batches of one optimizer step on one rank: the same number on every rank and at every step."""
        ...

    def loss(
        self, model: torch.nn.Module, batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(share of this batch in the loss of the global step, sums to be added over ranks and micro batches).

        Added up over all micro batches of all ranks, the losses give the loss of the step.
        """
        ...

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of a step from the sums of `loss`, added over all micro batches and ranks."""
        ...

    def seed(self, step: int, micro: int, rank: int) -> int:
        """Seed of the random numbers (dropout) that one micro batch draws."""
        ...

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Called on rank 0 after the last step with the full trained parameters by name, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a recipe is run. Nothing here changes what is learnt, except `zero_stage` and `dtype` by rounding."""

    name: str
    storage_path: str
    """Folder or bucket URL that every worker reaches; the run's checkpoints lie in storage_path/name."""
    num_workers: int = 2
    cpus_per_worker: float = 1
    use_gpu: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 1
    """Samples a rank in a micro batch. DeepSpeed only wants to know it for its own throughput figures."""
    zero_stage: Literal[0, 2, 3] = 3
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    log_every: int = 1
    max_failures: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "num_workers",
            "micro_batches",
            "checkpoint_every",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    metrics: dict[str, float]
    path: str


OnMetrics = Callable[[dict[str, float]], None]


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. What is trained is kept whole on every rank: gathering adapter
    matrices again and again costs more than their memory (`stage3_param_persistence_threshold`)."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": config.use_gpu,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 1_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }


def train(
    build: Callable[[], Recipe], config: TrainingConfig, on_metrics: OnMetrics | None = None
) -> TrainingResult:
    """Runs the recipe to its last step, resuming from the newest checkpoint of the same name and storage path.

    Args:
        build: called in every worker; must be picklable (a module-level function or a partial of one).
        on_metrics: called in this process, in another thread, with the metrics of every logged step, in order. Steps
            that are done again after a failure are reported again.

    Raises:
        ray.train.TrainingFailedError: when the workers failed more than `config.max_failures` times.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    with _forwarded(on_metrics) as callbacks:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"build": build, "config": config},
            torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker}
                | ({"GPU": 1} if config.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=config.name,
                storage_path=config.storage_path,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
                callbacks=callbacks,
                worker_runtime_env={"env_vars": _worker_environment(config)},  # type: ignore[call-arg]  # V2 has it
            ),
        )
        result = trainer.fit()
    return TrainingResult(metrics=dict(result.metrics or {}), path=str(result.path))


def _worker_environment(config: TrainingConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if not config.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment | dict(config.environment)


def _worker(loop_config: dict[str, Any]) -> None:
    """One rank, from process start to the last step. Runs inside a Ray Train worker."""
    import deepspeed
    import ray.train
    from transformers.integrations import HfDeepSpeedConfig

    config: TrainingConfig = loop_config["config"]
    settings = deepspeed_config(config)
    deepspeed.init_distributed(dist_backend="nccl" if config.use_gpu else "gloo", verbose=False)
    # Alive until the model is built: from_pretrained then shards frozen weights as it reads them, so that no rank
    # ever holds the whole model.
    sharding: Any = HfDeepSpeedConfig
    shard_on_load = sharding(settings) if config.zero_stage == 3 else None
    recipe: Recipe = loop_config["build"]()
    del shard_on_load
    optimizer = torch.optim.AdamW(
        recipe.parameters(), lr=recipe.learning_rate(0), weight_decay=config.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=recipe.model, optimizer=optimizer, config=settings)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    step = _resume(engine)
    while step < recipe.num_steps:
        started = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        metrics = _train_step(engine, recipe, config, step, rank, world_size)
        step += 1
        metrics |= {"step": float(step), "seconds_per_step": time.perf_counter() - started}
        last = step == recipe.num_steps
        if step % config.checkpoint_every == 0 or last:
            with tempfile.TemporaryDirectory(prefix="crab-checkpoint-") as folder:
                _save(engine, Path(folder), step, rank, world_size)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
        elif step % config.log_every == 0:
            ray.train.report(metrics)
    _export(engine, recipe, step, rank)


def _train_step(
    engine: Any, recipe: Recipe, config: TrainingConfig, step: int, rank: int, world_size: int
) -> dict[str, float]:
    engine.train()
    names: list[str] = []
    totals: torch.Tensor | None = None
    for micro, batch in enumerate(recipe.micro_batches(step, rank, world_size)):
        torch.manual_seed(recipe.seed(step, micro, rank))
        loss, sums = recipe.loss(engine, batch)
        # DeepSpeed divides by the number of micro batches and averages over ranks; our losses are shares of a sum.
        engine.backward(loss * (world_size * config.micro_batches))
        engine.step()
        values = sums | {"loss": loss.detach()}
        names = sorted(values)
        stacked = torch.stack([values[name].detach().double().cpu() for name in names])
        totals = stacked if totals is None else totals + stacked
    if totals is None:
        raise ValueError(f"the recipe gave no batch for step {step} on rank {rank} of {world_size}")
    if torch.distributed.is_initialized() and world_size > 1:
        on_device = totals.to(engine.device)
        torch.distributed.all_reduce(on_device)
        totals = on_device.cpu()
    sums_of_step = dict(zip(names, totals.tolist(), strict=True))
    metrics = recipe.metrics(sums_of_step) | {"loss": sums_of_step["loss"]}
    metrics["learning_rate"] = recipe.learning_rate(step)
    norm = engine.get_global_grad_norm()
    if norm is not None:
        metrics["gradient_norm"] = float(norm)
    return metrics


def _save(engine: Any, folder: Path, step: int, rank: int, world_size: int) -> None:
    engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=True)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "latest"
    }
    marker = {"step": step, "rank": rank, "world_size": world_size, "files": files}
    (folder / f"complete-{rank}.json").write_text(json.dumps(marker))


def completed_step(folder: Path) -> int | None:
    """The step of a checkpoint folder, or None if anything that its ranks wrote is not there in full."""
    markers = [json.loads(path.read_text()) for path in folder.glob("complete-*.json")]
    if not markers or len(markers) != markers[0]["world_size"]:
        return None
    for marker in markers:
        for name, size in marker["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
    return int(markers[0]["step"])


def _resume(engine: Any) -> int:
    """Loads the newest complete checkpoint of the run and returns its step; 0 when there is none."""
    import ray.train

    newest = ray.train.get_checkpoint()
    if newest is None:
        return 0
    reported = [item.checkpoint for item in ray.train.get_all_reported_checkpoints()]
    for checkpoint in [newest, *(c for c in reversed(reported) if c.path != newest.path)]:
        with checkpoint.as_directory() as folder:
            step = completed_step(Path(folder))
            if step is None:
                _LOG.warning(
                    "checkpoint %s is incomplete; trying the one before it", checkpoint.path
                )
                continue
            loaded, _ = engine.load_checkpoint(folder, tag="state", load_module_strict=False)
            if loaded is None:
                raise RuntimeError(f"DeepSpeed could not load checkpoint {checkpoint.path}")
            return step
    raise RuntimeError(
        f"no complete checkpoint among {[c.path for c in reported]}; remove the run to start again"
    )


def _export(engine: Any, recipe: Recipe, step: int, rank: int) -> None:
    import deepspeed

    trained = [(name, p) for name, p in recipe.model.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in trained], modifier_rank=None):
        state = {name: p.detach().to("cpu", copy=True) for name, p in trained} if rank == 0 else {}
    if rank == 0:
        empty = sorted(name for name, value in state.items() if value.numel() == 0)
        if empty:
            raise RuntimeError(f"ZeRO-3 gave empty tensors for {empty[:5]}: nothing was exported")
        recipe.export(state, step)
    torch.distributed.barrier()


@contextmanager
def _forwarded(on_metrics: OnMetrics | None) -> Iterator[list[Any]]:
    """Ray Train callbacks that bring every report from Ray Train's controller to `on_metrics` in this process."""
    if on_metrics is None:
        yield []
        return
    import ray.train
    from ray.util.queue import Queue

    reports = Queue(actor_options={"num_cpus": 0})

    class Forward(ray.train.UserCallback):
        def after_report(
            self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
        ) -> None:
            # Rank 0 speaks for all: what is reported was added up over the ranks.
            reports.put({name: float(value) for name, value in metrics[0].items()})

    def deliver() -> None:
        while (metrics := reports.get()) is not None:
            on_metrics(metrics)

    with ThreadPoolExecutor(1) as thread:
        delivered = thread.submit(deliver)
        try:
            yield [Forward()]
        finally:
            reports.put(None)
            delivered.result()
            reports.shutdown()
