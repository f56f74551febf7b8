"""Training as plain functions: which samples, which learning rate, which random numbers, which
losses.

Everything is a function of (seed, step): nothing is kept between steps, so a run that continues at
step k does what the run that was never stopped would have done, and any number of ranks sees the
same global batches. Who owns the ranks, the optimizer's shards and the files is somebody else's
business: this file knows no ray and no deepspeed.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Item = TypeVar("Item")


def cosine_lr(
    step: int, *, num_steps: int, peak: float, warmup: float = 0.03, floor: float = 0.0
) -> float:
    """Learning rate of `step` (from 0): linear warmup over `warmup` x num_steps, then half a cosine
    to `floor` x peak.

    Crab: peak 1e-4, warmup 3 %, floor 0. The first step has a rate above 0; steps past the end stay
    at the floor.
    """
    if num_steps < 1 or not 0 <= warmup <= 1 or not 0 <= floor <= 1 or step < 0:
        raise ValueError(
            "cosine_lr needs num_steps >= 1, 0 <= warmup <= 1, 0 <= floor <= 1, step >= 0; "
            f"got num_steps={num_steps}, warmup={warmup}, floor={floor}, step={step}"
        )
    warmup_steps = math.ceil(warmup * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation of range(num_samples), int64, a function of its arguments alone.

    Sorts raw Philox words, whose stream NumPy guarantees for ever (that of `permutation` it does
    not).
    """
    if num_samples < 1 or epoch < 0:
        raise ValueError(
            f"an order needs samples >= 1 and epoch >= 0, got {num_samples} and {epoch}"
        )
    words = np.random.Philox(key=_digest("order", seed, epoch)).random_raw(num_samples)
    return np.argsort(words, kind="stable")


def batch_indices(seed: int, step: int, global_batch: int, num_samples: int) -> list[int]:
    """Sample indices of one global step.

    The epochs' orders are laid end to end and cut every `global_batch`: each sample comes once an
    epoch, nothing is dropped, and a batch may hold the end of one epoch and the start of the next.
    """
    if global_batch < 1 or step < 0 or num_samples < 1:
        raise ValueError(
            "a step needs global_batch >= 1, step >= 0 and samples >= 1; "
            f"got {global_batch}, {step} and {num_samples}"
        )
    indices: list[int] = []
    position = step * global_batch
    while len(indices) < global_batch:
        epoch, offset = divmod(position, num_samples)
        part = epoch_order(seed, epoch, num_samples)[offset : offset + global_batch - len(indices)]
        indices += part.tolist()
        position += len(part)
    return indices


_CYCLE = 1000
"""Draws after which the shares of the tasks come out exactly; a share is rounded to a thousandth."""


def balanced_indices(
    seed: int,
    step: int,
    global_batch: int,
    tasks: Sequence[str],
    weights: Mapping[str, float] | None = None,
) -> list[int]:
    """Sample indices of one global step, each task taking its share whatever the number of its samples.

    The tasks' turns are spread evenly, so that any stretch of draws holds each task by its share (within about one draw
    a task). Within a task its samples come in the order of `epoch_order`, each once before any comes again.

    Args:
        tasks: the task of each sample.
        weights: task -> weight, relative to each other; None: all tasks alike. A task of weight 0 is not drawn.

    Raises:
        ValueError: weights and tasks are not of the same names, or a weight is negative, not finite, or all are 0.
    """
    if global_batch < 1 or step < 0 or not tasks:
        raise ValueError(
            "a step needs global_batch >= 1, step >= 0 and samples; "
            f"got {global_batch}, {step} and {len(tasks)}"
        )
    members: dict[str, list[int]] = {name: [] for name in sorted(set(tasks))}
    for index, task in enumerate(tasks):
        members[task].append(index)
    turns = _turns_a_cycle(members.keys(), weights)
    indices: list[int] = []
    cycle, offset = divmod(step * global_batch, _CYCLE)
    while len(indices) < global_batch:
        part = _cycle_of_tasks(seed, cycle, tuple(turns.items()))[
            offset : offset + global_batch - len(indices)
        ]
        orders: dict[tuple[str, int], np.ndarray] = {}
        for task, turn in part:
            own = members[task]
            epoch, place = divmod(cycle * turns[task] + turn, len(own))
            if (task, epoch) not in orders:
                orders[task, epoch] = epoch_order(_digest("task", seed, task), epoch, len(own))
            indices.append(own[orders[task, epoch][place]])
        cycle, offset = cycle + 1, 0
    return indices


def _turns_a_cycle(tasks: Iterable[str], weights: Mapping[str, float] | None) -> dict[str, int]:
    """Task -> draws in a cycle, by largest remainders; at least 1 where the weight is above 0."""
    names = sorted(tasks)
    given = dict.fromkeys(names, 1.0) if weights is None else dict(weights)
    if sorted(given) != names:
        raise ValueError(
            f"sampling weights are for {sorted(given)}, the samples are of {names}; weigh each of these"
        )
    if min(given.values()) < 0 or not 0 < sum(given.values()) < math.inf:
        raise ValueError(f"sampling weights must be 0 or more and not all 0, got {given}")
    total = sum(given.values())
    exact = {name: given[name] / total * _CYCLE for name in names}
    turns = {name: max(math.floor(exact[name]), exact[name] > 0) for name in names}
    by_need = sorted(names, key=lambda name: turns[name] - exact[name])
    while sum(turns.values()) < _CYCLE:
        turns[by_need.pop(0)] += 1
    while sum(turns.values()) > _CYCLE:
        turns[max(names, key=lambda name: turns[name])] -= 1
    return turns


@lru_cache(maxsize=4)
def _cycle_of_tasks(
    seed: int, cycle: int, turns: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    """(task, its how-manieth turn in the cycle): each task's turns at even distances from a random first one."""
    first = {task: _digest("turns", seed, cycle, task) / 2**128 for task, _ in turns}
    places = [
        ((turn + first[task]) / number, task, turn)
        for task, number in turns
        for turn in range(number)
    ]
    return tuple((task, turn) for _, task, turn in sorted(places))


def rank_slice(indices: Sequence[Item], rank: int, num_ranks: int) -> Sequence[Item]:
    """The part of a global batch that one rank takes: contiguous, in order, equal for all.

    Raises:
        ValueError: the batch does not divide by the ranks, or there is no such rank.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must lie in 0..{num_ranks - 1}, got {rank}")
    if len(indices) % num_ranks:
        raise ValueError(
            f"a global batch of {len(indices)} samples does not divide by {num_ranks} ranks; "
            "change one of them"
        )
    size = len(indices) // num_ranks
    return indices[rank * size : (rank + 1) * size]


def micro_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive parts of at most `size` items, for gradient accumulation."""
    if size < 1:
        raise ValueError(f"a micro-batch holds at least 1 sample, got {size}")
    return [items[start : start + size] for start in range(0, len(items), size)]


def step_seed(seed: int, step: int, position: int) -> int:
    """Seed of the dropout in one micro-batch, below 2^63.

    `position` is the place of its first sample in the global batch (rank x samples a rank +
    offset), not the rank: as long as the micro-batches are cut alike, one rank and eight ranks draw
    the same masks.
    """
    return _digest("dropout", seed, step, position) >> 65


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch seeded (CPU, and the CUDA devices there are), then put the old state
    back.
    """
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer. Decay (off by default, as in Crab) goes to matrices only, never to
    norms and biases.

    Raises:
        ValueError: nothing to train.
    """
    if not parameters:
        raise ValueError("no trainable parameters; is the adapter attached?")
    names = sorted(parameters)  # by name: the optimizer's state then lines up in every process
    if weight_decay == 0:
        return [{"params": [parameters[n] for n in names], "weight_decay": 0.0}]
    matrices = [n for n in names if parameters[n].ndim >= 2]
    others = [n for n in names if parameters[n].ndim < 2]
    groups = [
        {"params": [parameters[n] for n in matrices], "weight_decay": weight_decay},
        {"params": [parameters[n] for n in others], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def supervised_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that carry loss; their sum over a global batch is its normalizer."""
    return int((batch["labels"][:, 1:] != -100).sum())


def mask_frames(batch: Mapping[str, Tensor]) -> int:
    """Frames of a batch that carry mask loss; their sum over a global batch is its mask_normalizer."""
    return len(batch["mask_sample"]) if "mask_sample" in batch else 0


LossSums = dict[str, tuple[float, int]]
"""Task -> (summed cross entropy in nats, number of tokens). Sums, so that parts can be added up
exactly.
"""


def losses_by_task(tasks: Sequence[str], sample_loss: Tensor, sample_tokens: Tensor) -> LossSums:
    """Sums of one batch; `tasks` names the task of each sample, the tensors are CrabModel's outputs
    [N].
    """
    sums: LossSums = {}
    rows = zip(tasks, sample_loss.tolist(), sample_tokens.tolist(), strict=True)
    for task, loss, tokens in rows:
        old_loss, old_tokens = sums.get(task, (0.0, 0))
        sums[task] = (old_loss + loss, old_tokens + tokens)
    return sums


def add_losses(parts: Iterable[LossSums]) -> LossSums:
    """Sum over micro-batches, ranks or steps."""
    total: LossSums = {}
    for part in parts:
        for task, (loss, tokens) in part.items():
            old_loss, old_tokens = total.get(task, (0.0, 0))
            total[task] = (old_loss + loss, old_tokens + tokens)
    return total


def mean_losses(sums: LossSums) -> dict[str, float]:
    """Nats a token by task, and over all tokens under 'all'."""
    means = {task: loss / tokens for task, (loss, tokens) in sorted(sums.items()) if tokens}
    tokens = sum(count for _, count in sums.values())
    return means | ({"all": sum(loss for loss, _ in sums.values()) / tokens} if tokens else {})


def optimizer_step(
    model: Callable[..., Mapping[str, Tensor]],
    batches: Sequence[Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    max_grad_norm: float = 1.0,
    seeds: Sequence[int] | None = None,
) -> list[Mapping[str, Tensor]]:
    """One step of one process over micro-batches; returns the model's outputs for each.

    The loss is normalised by the supervised tokens (and the labelled frames) of all of them
    together, so that accumulation changes nothing. `seeds` (one a micro-batch, from step_seed) fixes the dropout.

    Raises:
        FloatingPointError: the gradient is not finite; the parameters are left as they were.
    """
    normalizer = float(sum(supervised_tokens(batch) for batch in batches))
    mask_normalizer = float(sum(mask_frames(batch) for batch in batches))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    outputs: list[Mapping[str, Tensor]] = []
    for index, batch in enumerate(batches):
        with nullcontext() if seeds is None else seeded(seeds[index]):
            output = model(batch, normalizer, mask_normalizer)
            output["loss"].backward()
        outputs.append({name: value.detach() for name, value in output.items()})
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise FloatingPointError(
            f"gradient norm is {float(norm)} at lr {lr}; lower the rate or train in float32"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return outputs


def _digest(*parts: str | int) -> int:
    """128 bits from the parts' text."""
    text = "/".join(map(str, ("crab.train 1", *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16])
