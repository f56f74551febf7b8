"""One rank of a training run."""

from __future__ import annotations

import logging
from typing import Any

import torch

from crab_platform import checkpoint
from crab_platform.checkpoint import CheckpointMismatchError, DataChangedError
from crab_platform.checkpoint_writer import CheckpointWriter
from crab_platform.guards import SkippedTooOftenError
from crab_platform.hang import Pulse
from crab_platform.learner import Learner
from crab_platform.notice import Notice
from crab_platform.storage import Store, open_store
from crab_platform.training_config import Recipe, TrainingConfig, deepspeed_config

_LOG = logging.getLogger(__name__)
STOPPED, GAVE_UP = "stopped", "gave up"
"""In what a worker returns that ended early. It returns, as Ray Train would start one that raises again."""
REASONS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (CheckpointMismatchError, DataChangedError, SkippedTooOftenError)
}
"""Why a run ends that would end the same way if it were started again."""


def work(loop_config: dict[str, Any]) -> dict[str, Any]:
    """One rank, from process start to the last step, whose metrics it returns. Runs inside a Ray Train worker."""
    import ray
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    node = ray.get_runtime_context().get_node_id()
    try:
        with Pulse(loop_config["board"], rank, node) as pulse:
            return _work(loop_config, pulse)
    except tuple(REASONS.values()) as error:  # on all ranks in the same place
        return {GAVE_UP: (type(error).__name__, str(error))}


def _work(loop_config: dict[str, Any], pulse: Pulse) -> dict[str, Any]:
    import ray.train
    import ray.util
    from transformers.integrations import HfDeepSpeedConfig

    reports = loop_config["reports"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    if rank == 0 and reports is not None:
        group: Any = ray.util.get_current_placement_group()
        reports.put(str(group.id.hex()))
    wanted: TrainingConfig = loop_config["config"]
    config = wanted.with_workers(world_size)
    repeat_exactly(use_gpu=config.use_gpu)
    settings = deepspeed_config(config)
    init_distributed(use_gpu=config.use_gpu)
    # Alive until the model is built: from_pretrained then shards frozen weights as it reads them, so that no rank
    # ever holds the whole model.
    sharding: Any = HfDeepSpeedConfig
    shard_on_load = sharding(settings) if config.zero_stage == 3 else None
    recipe: Recipe = loop_config["build"]()
    del shard_on_load
    store = open_store(config.run)
    learner = Learner(recipe, config, rank, world_size, pulse)
    found = _found(store, learner.layout, recipe.data, config, rank)
    learner.begin(checkpoint.read(store, found) if found else None)
    notice = Notice(loop_config["bell"], rank)
    with CheckpointWriter(store, keep=config.keep_checkpoints) as writer:

        def save() -> None:
            state, marker = learner.state()
            if rank == 0:
                writer.submit(state, marker)

        stopped = False
        end = min(recipe.num_steps, config.stop_after or recipe.num_steps)
        while learner.step < end:
            metrics = learner.learn()
            step = learner.step
            last = step == end
            if config.validate_every and (step % config.validate_every == 0 or last):
                metrics |= learner.validate()
            # Before the checkpoint, and waiting until it is there: a step that is not done again was seen.
            if rank == 0 and reports is not None and (step % config.log_every == 0 or last):
                reports.put(metrics)
            news = notice.news()
            pulse.did("end", step)
            if step % config.checkpoint_every == 0 or last or news != "none":
                save()
            if news != "none" and rank == 0 and not writer.wait(config.write_timeout_s):
                _LOG.warning("the checkpoint of step %d is not written yet", step)
            if news == "stop" and not last:
                stopped = True
                break
        if stopped:
            return learner.metrics | {STOPPED: 1.0}
        trained = learner.weights()
        if rank == 0:
            writer.close(config.write_timeout_s)
            if end == recipe.num_steps:
                recipe.export(trained, learner.step)
    torch.distributed.barrier()
    return learner.metrics


def repeat_exactly(*, use_gpu: bool) -> None:
    """From here on the same step gives the same bits: a resumed run must repeat the one that was not stopped."""
    # Where CUDA has only a kernel that does not repeat itself (attention that is not flash), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=use_gpu)
    # That switch also fills new memory with NaN, which costs time and is for finding bugs.
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False


def init_distributed(*, use_gpu: bool) -> None:
    """The process group, for torch and DeepSpeed, of what the launcher has put into the environment.

    On CPUs DeepSpeed would first compile an all-reduce in shared memory, for inference; nothing in training calls it. A
    worker that is killed while it compiles leaves a lock, for which all later ones of the machine wait without an end.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", verbose=False)


def _found(
    store: Store, layout: dict[str, Any], data: str, config: TrainingConfig, rank: int
) -> str | None:
    """The checkpoint to go on from, the same on every rank; rank 0 looks, and removes what cannot be used."""
    from ray.train.collective import broadcast_from_rank_zero

    name: str | None = None
    refused: tuple[str, str] | None = None
    if rank == 0:
        try:
            found = checkpoint.newest(
                store, layout, data, changed_data=config.changed_data == "continue"
            )
        except CheckpointMismatchError as error:
            refused = type(error).__name__, str(error)
        else:
            name = found[0] if found else None
            checkpoint.remove_unusable(store, name)
    told: Any = broadcast_from_rank_zero((name, refused))
    name, refused = told
    if refused is not None:
        raise REASONS[refused[0]](refused[1])
    if name is not None:
        _LOG.info("going on from %s/%s", store.url, name)
    return name
