"""Ray Train V2 runs the workers, DeepSpeed ZeRO shards what they hold.

This file knows nothing of the model. A job hands in a *recipe*: a callable that every worker calls once to build
its model and its batches. What is trained must be small next to what is frozen (adapter, projectors), so a
checkpoint holds only trained parameters, their optimizer state and the step: the data order and the dropout of a
step are functions of (seed, step), which makes the step the whole cursor.

Metrics do not travel with `ray.train.report`: Ray Train's controller takes one report every two seconds
(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S), and a worker that has another one waits. Rank 0 puts them in a queue that the
driver reads; only checkpoints are reported. See checkpoint.py for what makes a checkpoint one.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from crab_platform import checkpoint


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
        """Called on rank 0 after the last step with the full trained parameters by name, on the CPU.

        Called again if the run is killed before it has ended, or started again when it has: it must replace what is
        there.
        """
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
            "micro_batch_size",
            "checkpoint_every",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def run(self) -> str:
        """The run's own folder, a path or URL."""
        return f"{self.storage_path.rstrip('/')}/{self.name}"


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
    """Runs the recipe to its last step, resuming from the newest whole checkpoint of the same name and storage path.

    Args:
        build: called in every worker; must be picklable (a module-level function or a partial of one).
        on_metrics: called in this process, in another thread, with the metrics of every logged step: once a step and
            in order, also when steps are done again after a failure. An error that it raises is raised at the end.

    Returns:
        The metrics of the last step, and the run's folder.

    Raises:
        ray.train.TrainingFailedError: when the workers failed more than `config.max_failures` times.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    checkpoint.mend(config.run)
    with _forwarded(on_metrics) as reports:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"build": build, "config": config, "reports": reports},
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
                worker_runtime_env={"env_vars": _worker_environment(config)},  # type: ignore[call-arg]  # V2 has it
            ),
        )
        try:
            result = trainer.fit()
        except (
            SystemExit
        ) as error:  # how Ray Train ends on Ctrl-C, after it has stopped its workers
            raise KeyboardInterrupt from error
    return TrainingResult(metrics=dict(result.metrics or {}), path=str(result.path))


def _worker_environment(config: TrainingConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "DS_ACCELERATOR": "cuda" if config.use_gpu else "cpu",
    }
    if config.use_gpu:
        environment["CUBLAS_WORKSPACE_CONFIG"] = (
            ":4096:8"  # cuBLAS repeats itself only with a fixed workspace
        )
    return environment | dict(config.environment)


def _worker(loop_config: dict[str, Any]) -> None:
    """One rank, from process start to the last step. Runs inside a Ray Train worker."""
    import deepspeed
    import ray.train
    from transformers.integrations import HfDeepSpeedConfig

    config: TrainingConfig = loop_config["config"]
    reports = loop_config["reports"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # A resumed run must repeat the one that was not stopped. Where CUDA has only a kernel that does not repeat itself
    # (attention that is not flash), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=config.use_gpu)
    # That switch also fills new memory with NaN, which costs time and is for finding bugs.
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False
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

    layout = checkpoint.layout(
        recipe.model,
        {"world_size": world_size, "zero_stage": config.zero_stage, "dtype": config.dtype},
    )
    step = checkpoint.resume(engine, config.run, rank, layout)
    while step < recipe.num_steps:
        started = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        metrics = _train_step(engine, recipe, config, step, rank, world_size)
        step += 1
        metrics |= {"step": float(step), "seconds_per_step": time.perf_counter() - started}
        last = step == recipe.num_steps
        # Before the checkpoint, and waiting until it is there: a step that is not done again was seen.
        if rank == 0 and reports is not None and (step % config.log_every == 0 or last):
            reports.put(metrics)
        if step % config.checkpoint_every == 0 or last:
            with tempfile.TemporaryDirectory(prefix="crab-checkpoint-") as folder:
                checkpoint.save(engine, Path(folder), step, rank, layout)
                ray.train.report(
                    metrics,
                    checkpoint=ray.train.Checkpoint.from_directory(folder),
                    checkpoint_dir_name=checkpoint.new_name(step),  # rank 0's counts
                )
    state = checkpoint.gather_trained(recipe.model, rank)
    if rank == 0:
        recipe.export(state, step)
    torch.distributed.barrier()


def _train_step(
    engine: Any, recipe: Recipe, config: TrainingConfig, step: int, rank: int, world_size: int
) -> dict[str, float]:
    engine.train()
    names: list[str] = []
    totals: torch.Tensor | None = None
    num_batches = 0
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
        num_batches = micro + 1
    if totals is None or num_batches != config.micro_batches:
        raise ValueError(
            f"the recipe gave {num_batches} micro batches for step {step} on rank {rank} of {world_size}, expected "
            f"micro_batches={config.micro_batches}: DeepSpeed would take its optimizer step at another place"
        )
    on_device = totals.to(engine.device)
    torch.distributed.all_reduce(on_device)
    totals = on_device.cpu()
    sums_of_step = dict(zip(names, totals.tolist(), strict=True))
    metrics = recipe.metrics(sums_of_step) | {"loss": sums_of_step["loss"]}
    metrics["learning_rate"] = recipe.learning_rate(step)
    norm = engine.get_global_grad_norm()
    if norm is not None:
        metrics["gradient_norm"] = float(norm)
    wrong = [n for n in ("loss", "gradient_norm") if not math.isfinite(metrics.get(n, 0.0))]
    if wrong:
        raise FloatingPointError(
            f"step {step + 1}: {wrong[0]} is {metrics[wrong[0]]} at learning rate {metrics['learning_rate']:g}; "
            "no checkpoint holds it. Lower the rate, or train in float32"
        )
    return metrics


@contextmanager
def _forwarded(on_metrics: OnMetrics | None) -> Iterator[Any]:
    """A queue whose items, metrics of one step each, go to `on_metrics` in this process; None without `on_metrics`."""
    if on_metrics is None:
        yield None
        return
    from ray.util.queue import Queue

    reports = Queue(actor_options={"num_cpus": 0})

    def deliver() -> None:
        seen = 0.0
        while (metrics := reports.get()) is not None:
            if (
                metrics["step"] > seen
            ):  # else it was done again after a failure, with the same result
                seen = metrics["step"]
                on_metrics(metrics)

    with ThreadPoolExecutor(1) as thread:
        delivered = thread.submit(deliver)
        try:
            yield reports
        finally:
            reports.put(None)
            delivered.result()
            reports.shutdown()
