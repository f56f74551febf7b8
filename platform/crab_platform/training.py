"""Ray Train V2 runs the workers, DeepSpeed ZeRO shards what they hold.

This file knows nothing of the model. A job hands in a *recipe*: a callable that every worker calls once to build
its model and its batches. What is trained must be small next to what is frozen (adapter, projectors), so a
checkpoint holds only trained parameters, their optimizer state and the step: the data order and the dropout of a
step are functions of (seed, step), which makes the step the whole cursor.

A global batch is cut into `num_workers * micro_batches` parts, and dropout depends on the part, never on the rank. So a
run goes on with any number of workers that makes the same number of parts, and learns the same but for the order in
which float32 sums are taken.

Neither metrics nor checkpoints travel with `ray.train.report`: Ray Train's controller takes one report every two
seconds (RAY_TRAIN_HEALTH_CHECK_INTERVAL_S), and a worker that has another one waits. Rank 0 puts metrics in a queue
that the driver reads, and writes checkpoints while training goes on (checkpoint_writer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

from crab_platform import checkpoint, nccl_watch
from crab_platform.hang import is_at_work, watched
from crab_platform.notice import Stopped, rung_by_sigterm
from crab_platform.storage import open_store
from crab_platform.training_config import Recipe, TrainingConfig
from crab_platform.training_worker import GAVE_UP, REASONS, STOPPED, work

__all__ = ["OnMetrics", "Recipe", "Stopped", "TrainingConfig", "TrainingResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    metrics: dict[str, float]
    path: str


OnMetrics = Callable[[dict[str, float]], None]


def train(
    build: Callable[[], Recipe],
    config: TrainingConfig,
    on_metrics: OnMetrics | None = None,
    *,
    stop: Event | None = None,
    on_group: Callable[[str], None] | None = None,
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
        Stopped: SIGTERM came; what was learnt is in a checkpoint.
        SkippedTooOftenError: losses or gradients were no numbers, or far too large, several steps in a row.
        CheckpointMismatchError, DataChangedError: the run's checkpoints are of another model, or of other data.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    num_workers: Any = config.num_workers  # types do not know limits
    if config.min_workers is not None:
        num_workers = (config.min_workers, config.num_workers)
    store = open_store(config.run)
    checkpoint.mend(store)
    with (
        _forwarded(on_metrics, on_group) as reports,
        watched(store, config.hang_timeout_s) as board,
        rung_by_sigterm(stop or Event(), lambda: is_at_work(ray.get(board.read.remote()))) as bell,
        nccl_watch.observed(use_gpu=config.use_gpu, hang_timeout_s=config.hang_timeout_s),
    ):
        loop: Any = work  # types know V1, whose loop returns nothing
        trainer = TorchTrainer(
            loop,
            train_loop_config={
                "build": build,
                "config": config,
                "reports": reports,
                "bell": bell,
                "board": board,
            },
            torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=num_workers,
                use_gpu=config.use_gpu,
                resources_per_worker={"CPU": config.cpus_per_worker}
                | ({"GPU": 1} if config.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=config.name,
                storage_path=config.storage_path,
                # Preemptions do not count: Ray has a budget of its own for them, without an end.
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                worker_runtime_env={"env_vars": _worker_environment(config)},  # type: ignore[call-arg]  # V2 has it
            ),
        )
        try:
            result: Any = trainer.fit()
        except SystemExit as error:  # of Ray Train on Ctrl-C, after it has stopped its workers
            raise KeyboardInterrupt from error
    metrics: dict[str, Any] = dict(result.return_value or {})
    if GAVE_UP in metrics:
        reason, text = metrics[GAVE_UP]
        raise REASONS[reason](text)
    if metrics.pop(STOPPED, None):
        raise Stopped(
            f"stopped after step {int(metrics['step'])} by SIGTERM, with a checkpoint in {config.run}; start the same "
            "command again to go on"
        )
    return TrainingResult(metrics=metrics, path=str(result.path))


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


@contextmanager
def _forwarded(
    on_metrics: OnMetrics | None, on_group: Callable[[str], None] | None
) -> Iterator[Any]:
    """A queue whose items, metrics of one step each or the name of a placement group, go to these functions in this
    process; None without `on_metrics`."""
    if on_metrics is None:
        yield None
        return
    from ray.util.queue import Queue

    reports = Queue(actor_options={"num_cpus": 0})

    def deliver() -> None:
        seen = 0.0
        while (told := reports.get()) is not None:
            if isinstance(told, str):
                if on_group is not None:
                    on_group(told)
            elif (
                told["step"] > seen
            ):  # else it was done again after a failure, with the same result
                seen = told["step"]
                on_metrics(told)

    with ThreadPoolExecutor(1) as thread:
        delivered = thread.submit(deliver)
        try:
            yield reports
        finally:
            reports.put(None)
            delivered.result()
            reports.shutdown()
