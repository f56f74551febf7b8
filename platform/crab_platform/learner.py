"""What one rank trains: a recipe in its engine, at some step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from crab_platform import checkpoint, engine_state, throughput
from crab_platform.checkpoint import Marker
from crab_platform.guards import Gate, Guard
from crab_platform.hang import Pulse
from crab_platform.training_config import Recipe, TrainingConfig, deepspeed_config

_LOG = logging.getLogger(__name__)


class Learner:
    """One rank of a run. All ranks call the same methods in the same order."""

    def __init__(
        self, recipe: Recipe, config: TrainingConfig, rank: int, world_size: int, pulse: Pulse
    ) -> None:
        """`config` is of as many workers as there are; the process group is up."""
        self.recipe = recipe
        self.config = config
        self.step = 0
        """Optimizer steps that were done."""
        self.metrics: dict[str, float] = {}
        """Of the last step."""
        self._rank, self._world_size, self._pulse = rank, world_size, pulse
        self.layout = checkpoint.layout(
            recipe.model,
            {"workers x micro_batches": world_size * config.micro_batches, "dtype": config.dtype},
        )
        self._engine: Any = None
        self._guard = Guard()
        self._gate: Gate

    def begin(self, found: tuple[Marker, Mapping[str, Tensor]] | None) -> None:
        """Makes the engine, in the state of a checkpoint where there is one; it must have this layout."""
        import deepspeed

        if found is not None:
            engine_state.put_weights(self.recipe.model, found[1], self._rank)
        optimizer = torch.optim.AdamW(
            self.recipe.parameters(),
            lr=self.recipe.learning_rate(0),
            weight_decay=self.config.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=self.recipe.model, optimizer=optimizer, config=deepspeed_config(self.config)
        )
        engine_state.prepare(self._engine)
        self._gate = Gate(self._engine)
        if found is not None:
            marker, state = found
            engine_state.put_moments(
                self._engine, state, marker.adam_step, self._world_size, self._rank
            )
            self.step, self.metrics = marker.step, marker.metrics
            self._guard.load(marker.guard)

    def learn(self) -> dict[str, float]:
        """Does one optimizer step and returns its metrics."""
        started = time.perf_counter()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step)
        metrics, worst = train_step(
            *(self._engine, self.recipe, self.config, self.step, self._rank, self._world_size),
            *(self._gate, self._guard, self._pulse),
        )
        self.step += 1
        metrics["step"] = float(self.step)
        metrics |= throughput.rates(
            metrics,
            seconds=time.perf_counter() - started,
            samples=self.config.micro_batch_size * self._world_size * self.config.micro_batches,
            **worst,
        )
        self.metrics = metrics
        return metrics

    def validate(self) -> dict[str, float]:
        """Metrics of what is held out, as the model is now, by names that begin with `val/`. Nothing is learnt."""
        self._engine.eval()
        totals: torch.Tensor | None = None
        shapes: dict[str, torch.Size] = {}
        with torch.no_grad():
            for batch in self.recipe.validation_batches(self._rank, self._world_size):
                self._pulse.did("train", self.step)
                loss, sums = self.recipe.loss(self._engine, batch)
                values = sums | {"loss": loss}
                shapes = {name: values[name].shape for name in sorted(values)}
                flat = _flat(values, shapes)
                totals = flat if totals is None else totals + flat
        self._engine.train()
        if totals is None:
            raise ValueError("nothing is held out: the recipe gave no validation batch")
        on_device = totals.to(self._engine.device)
        torch.distributed.all_reduce(on_device)
        sums_of_all = _unpacked(on_device.cpu(), shapes)
        metrics = self.recipe.metrics(sums_of_all) | {"loss": sums_of_all["loss"]}
        self._pulse.did("data", self.step)
        return {f"val/{name}": value for name, value in metrics.items()}

    def state(self) -> tuple[dict[str, Tensor], Marker]:
        """(what is trained and Adam's moments, whole, on rank 0 only; what goes with them into a checkpoint)."""
        state, adam_step = engine_state.gather(self._engine, self._rank)
        return state, Marker(
            step=self.step,
            adam_step=adam_step,
            layout=self.layout,
            data=self.recipe.data,
            guard=self._guard.state(),
            metrics={name: v for name, v in self.metrics.items() if math.isfinite(v)},
        )

    def end(self) -> None:
        """Lets the engine go; the recipe's model stays as it is."""
        self._engine.destroy()
        self._engine = None

    def weights(self) -> dict[str, Tensor]:
        """What is trained, whole, on the CPU of rank 0."""
        return engine_state.gather_weights(self._engine, self._rank)


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
        flat = _flat(values, shapes)
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


def _flat(values: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> torch.Tensor:
    """All values in one row, in the order of `shapes`, on the CPU in float64."""
    return torch.cat([values[name].detach().double().cpu().flatten() for name in shapes])


def _unpacked(flat: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Scalars as floats, others as tensors of their shapes, from all in one row."""
    found: dict[str, Any] = {}
    start = 0
    for name, shape in shapes.items():
        part = flat[start : start + shape.numel()]
        found[name] = part.view(shape) if shape else part.item()
        start += shape.numel()
    return found
