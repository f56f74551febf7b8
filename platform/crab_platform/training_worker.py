"""One rank of a training run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from crab_platform import checkpoint, engine_state, throughput
from crab_platform.checkpoint import CheckpointMismatchError, DataChangedError, Marker
from crab_platform.checkpoint_writer import CheckpointWriter
from crab_platform.guards import Gate, Guard, SkippedTooOftenError
from crab_platform.hang import Pulse
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
    import deepspeed
    import ray.train
    from transformers.integrations import HfDeepSpeedConfig

    reports = loop_config["reports"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    wanted: TrainingConfig = loop_config["config"]
    config = wanted.with_workers(world_size)
    # A resumed run must repeat the one that was not stopped. Where CUDA has only a kernel that does not repeat itself
    # (attention that is not flash), it says so and goes on.
    torch.use_deterministic_algorithms(True, warn_only=config.use_gpu)
    # That switch also fills new memory with NaN, which costs time and is for finding bugs.
    debugging: Any = torch.utils.deterministic
    debugging.fill_uninitialized_memory = False
    settings = deepspeed_config(config)
    init_distributed(use_gpu=config.use_gpu)
    # Alive until the model is built: from_pretrained then shards frozen weights as it reads them, so that no rank
    # ever holds the whole model.
    sharding: Any = HfDeepSpeedConfig
    shard_on_load = sharding(settings) if config.zero_stage == 3 else None
    recipe: Recipe = loop_config["build"]()
    del shard_on_load
    store = open_store(config.run)
    parts = world_size * config.micro_batches
    layout = checkpoint.layout(
        recipe.model, {"workers x micro_batches": parts, "dtype": config.dtype}
    )
    found = _found(store, layout, recipe.data, config, rank)
    marker, state = checkpoint.read(store, found) if found else (None, {})
    if marker is not None:
        engine_state.put_weights(recipe.model, state, rank)
    optimizer = torch.optim.AdamW(
        recipe.parameters(), lr=recipe.learning_rate(0), weight_decay=config.weight_decay
    )
    engine, *_ = deepspeed.initialize(model=recipe.model, optimizer=optimizer, config=settings)
    engine_state.prepare(engine)
    gate, guard = Gate(engine), Guard()
    step, metrics = 0, {}
    if marker is not None:
        engine_state.put_moments(engine, state, marker.adam_step, world_size, rank)
        step, metrics = marker.step, marker.metrics
        guard.load(marker.guard)
    del state
    notice = Notice(loop_config["bell"], rank)
    with CheckpointWriter(store, keep=config.keep_checkpoints) as writer:

        def save() -> None:
            state, adam_step = engine_state.gather(engine, rank)
            if rank == 0:
                marker = Marker(
                    step=step,
                    adam_step=adam_step,
                    layout=layout,
                    data=recipe.data,
                    guard=guard.state(),
                    metrics={name: v for name, v in metrics.items() if math.isfinite(v)},
                )
                writer.submit(state, marker)

        stopped = False
        while step < recipe.num_steps:
            started = time.perf_counter()
            for group in engine.optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            metrics, worst = train_step(
                engine, recipe, config, step, rank, world_size, gate, guard, pulse
            )
            step += 1
            metrics["step"] = float(step)
            metrics |= throughput.rates(
                metrics,
                seconds=time.perf_counter() - started,
                samples=config.micro_batch_size * parts,
                **worst,
            )
            last = step == recipe.num_steps
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
            return metrics | {STOPPED: 1.0}
        trained = engine_state.gather_weights(engine, rank)
        if rank == 0:
            writer.close(config.write_timeout_s)
            recipe.export(trained, step)
    torch.distributed.barrier()
    return metrics


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


def train_step(
    engine: Any,
    recipe: Recipe,
    config: TrainingConfig,
    step: int,
    rank: int,
    world_size: int,
    gate: Gate,
    guard: Guard,
    pulse: Pulse,
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the step, and what the worst rank waited and held (see throughput.rates)."""
    engine.train()
    shapes: dict[str, torch.Size] = {}
    totals: torch.Tensor | None = None
    num_batches = 0
    judged: dict[str, float] = {}

    def may_update(norm: float | None) -> bool:
        if norm is not None:
            judged["gradient_norm"] = norm
        return guard.objection(judged) is None

    pulse.did("data", step + 1)
    waited = throughput.Waited()
    # Where every rank writes what it alone knows: added up with the sums, they are all there, in one reduction.
    of_ranks = torch.zeros(2, world_size, dtype=torch.float64)
    batches = waited.through(recipe.micro_batches(step, rank, world_size))
    for micro, batch in enumerate(batches):
        pulse.did("train", step + 1)
        torch.manual_seed(recipe.seed(step, micro, rank))
        loss, sums = recipe.loss(engine, batch)
        # DeepSpeed divides by the number of micro batches and averages over ranks; our losses are shares of a sum.
        engine.backward(loss * (world_size * config.micro_batches))
        values = sums | {"loss": loss.detach()}
        shapes = {name: values[name].shape for name in sorted(values)}
        flat = torch.cat([values[name].detach().double().cpu().flatten() for name in shapes])
        totals = flat if totals is None else totals + flat
        num_batches = micro + 1
        if num_batches == config.micro_batches:  # the engine updates now: judge what all ranks see
            of_ranks[0, rank] = waited.seconds
            of_ranks[1, rank] = throughput.peak_memory_bytes(engine.device)
            on_device = torch.cat([of_ranks.flatten(), totals]).to(engine.device)
            torch.distributed.all_reduce(on_device)
            told, count = on_device.cpu(), of_ranks.numel()
            of_ranks, totals = told[:count].view_as(of_ranks), told[count:]
            judged["loss"] = _unpacked(totals, shapes)["loss"]
            gate.arm(may_update)
        engine.step()
        pulse.did("train", step + 1)
        pulse.did("data", step + 1)
    if totals is None or num_batches != config.micro_batches:
        raise ValueError(
            f"the recipe gave {num_batches} micro batches for step {step} on rank {rank} of {world_size}, expected "
            f"micro_batches={config.micro_batches}: DeepSpeed would take its optimizer step at another place"
        )
    sums_of_step = _unpacked(totals, shapes)
    metrics = recipe.metrics(sums_of_step) | {"loss": sums_of_step["loss"]}
    metrics["learning_rate"] = recipe.learning_rate(step)
    norm = engine.get_global_grad_norm()
    if norm is not None and gate.passed():
        metrics["gradient_norm"] = float(norm)
    objection = None
    if not gate.passed():
        # Without an objection of ours DeepSpeed left the update out, for a norm that is no number.
        objection = guard.objection(judged) or "gradient_norm is nan"
        if rank == 0:
            _LOG.warning("step %d is skipped: %s", step + 1, objection)
    guard.note(step + 1, judged, objection)
    metrics["skipped_steps"] = float(guard.skipped_steps)
    waited_s, peak_bytes = of_ranks.max(dim=1).values.tolist()
    return metrics, {"waited_s": waited_s, "peak_bytes": peak_bytes}


def _unpacked(flat: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Scalars as floats, others as tensors of their shapes, from all in one row."""
    found: dict[str, Any] = {}
    start = 0
    for name, shape in shapes.items():
        part = flat[start : start + shape.numel()]
        found[name] = part.view(shape) if shape else part.item()
        start += shape.numel()
    return found
