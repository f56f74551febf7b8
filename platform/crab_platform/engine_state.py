"""What a DeepSpeed engine has learnt, whole: weights in float32 and the moments of Adam, by parameter name.

Engines shard this in ways that depend on the ZeRO stage and on the number of ranks. Put together it fits any of them,
so a run can go on with other workers, and a checkpoint is plain tensors and holds nothing that is frozen.

Adam's state of each parameter is `exp_avg`, `exp_avg_sq` and the number of steps, which is one for all (torch.optim).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
BUCKET_BYTES = 64 << 20
"""So much is gathered at a time: rank 0 holds it once a rank on its device."""


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shape_of(parameter: torch.nn.Parameter) -> list[int]:
    """The full shape; ZeRO-3 leaves the parameter itself empty."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def put_weights(model: torch.nn.Module, state: Mapping[str, Tensor], rank: int) -> None:
    """Writes the weights of `state` (see `gather`; needed on every rank) into a model, before its engine is made.

    Raises KeyError for a trained parameter that `state` lacks.
    """
    import deepspeed

    for name, parameter in trained(model).items():
        value = state[f"{WEIGHT}/{name}"]
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if rank == 0:
                    parameter.copy_(value)
        else:
            with torch.no_grad():
                parameter.copy_(value)


def prepare(engine: Any) -> None:
    """Gives Adam its state before its first step, as torch does in it: zeros. Then it can be set and gathered.

    Without ZeRO, in bfloat16, DeepSpeed has made a step with no gradient by now, and Adam would count one too many.
    """
    state = _adam(engine).state
    for flat in _flat_weights(engine):
        state[flat]["step"] = torch.tensor(0.0)
        for moment in MOMENTS:
            state[flat][moment] = torch.zeros_like(flat)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def put_moments(
    engine: Any, state: Mapping[str, Tensor], adam_step: int, world_size: int, rank: int
) -> None:
    """Sets float32 weights and moments of a prepared engine to those of `state`, on every rank its part."""
    for name, parameter in trained(engine.module).items():
        for kind in (None, *MOMENTS):
            _put(engine, parameter, kind, state[f"{kind or WEIGHT}/{name}"], world_size, rank)
    for flat in _flat_weights(engine):
        _adam(engine).state[flat]["step"].fill_(adam_step)


def gather(engine: Any, rank: int) -> tuple[dict[str, Tensor], int]:
    """({"weight/NAME", "exp_avg/NAME", "exp_avg_sq/NAME": float32 on the CPU}, Adam's steps). Every rank calls it; only
    rank 0 gets tensors.
    """
    wanted = [
        _Wanted(f"{kind or WEIGHT}/{name}", parameter, kind, math.prod(shape_of(parameter)))
        for name, parameter in trained(engine.module).items()
        for kind in (None, *MOMENTS)
    ]
    found: dict[str, Tensor] = {}
    for bucket in _buckets(wanted):
        for one, value in zip(bucket, _whole(engine, bucket, rank), strict=rank == 0):
            found[one.name] = value.view(shape_of(one.parameter))
    steps = {int(_adam(engine).state[flat]["step"]) for flat in _flat_weights(engine)}
    if len(steps) != 1:
        raise RuntimeError(
            f"Adam counts {sorted(steps)} steps for different parameters of one engine"
        )
    return found, steps.pop()


def gather_weights(engine: Any, rank: int) -> dict[str, Tensor]:
    """Trained parameters in full by name, in their own dtype, on the CPU of rank 0; nothing on others. Every rank calls
    it.

    Raises RuntimeError where a tensor came out empty, as ZeRO-3's ungathered ones are.
    """
    import deepspeed

    parameters = trained(engine.module)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        state = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items() if rank == 0}
    empty = sorted(name for name, value in state.items() if value.numel() == 0)
    if empty:
        raise RuntimeError(f"ZeRO-3 gave empty tensors for {empty[:5]}: nothing was exported")
    return state


def _adam(engine: Any) -> Any:
    return engine.basic_optimizer


def _flat_weights(engine: Any) -> Iterator[Tensor]:
    """The float32 tensors that Adam steps: flat shards under ZeRO, else the parameters themselves."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
    ):
        if hasattr(engine.optimizer, name):
            yield from getattr(engine.optimizer, name)
            return
    for group in _adam(engine).param_groups:
        yield from group["params"]


def _master(engine: Any, parameter: torch.nn.Parameter) -> Tensor:
    """What Adam steps for a parameter that is not sharded: itself, or in bfloat16 its float32 form."""
    groups = (
        getattr(engine.optimizer, "fp16_groups", ()),
        getattr(engine.optimizer, "fp32_groups", ()),
    )
    for group, masters in zip(*groups, strict=True):
        for one, master in zip(group, masters, strict=True):
            if one is parameter:
                assert isinstance(master, Tensor)
                return master
    return parameter


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


class _Wanted(NamedTuple):
    """Weight (kind None) or moment of a parameter."""

    name: str
    parameter: torch.nn.Parameter
    kind: str | None
    numel: int


def _buckets(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Of at most BUCKET_BYTES, or of one that is larger, in order."""
    bucket: list[_Wanted] = []
    held = 0
    for one in wanted:
        if bucket and held + 4 * one.numel > BUCKET_BYTES:
            yield bucket
            bucket, held = [], 0
        bucket.append(one)
        held += 4 * one.numel
    yield bucket


def _whole(engine: Any, bucket: Sequence[_Wanted], rank: int) -> list[Tensor]:
    """Flat float32 on the CPU, for rank 0; nothing on others.

    One collective a bucket. DeepSpeed's own functions make one a tensor: of a tiny Crab that was 0.9 s for 2 MB.
    """
    if hasattr(bucket[0].parameter, "ds_id"):
        return _from_shards(bucket, rank)
    if hasattr(bucket[0].parameter, "_hp_mapping"):
        return _from_fragments(bucket, rank)
    if rank != 0:
        return []
    masters = [(_master(engine, one.parameter), one.kind) for one in bucket]
    state = _adam(engine).state
    return [_to_cpu(master if kind is None else state[master][kind]) for master, kind in masters]


def _from_shards(bucket: Sequence[_Wanted], rank: int) -> list[Tensor]:
    """ZeRO-3: every rank holds an equal part of each tensor, the last one padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    mine = [
        safe_get_local_fp32_param(one.parameter)
        if one.kind is None
        else safe_get_local_optimizer_state(one.parameter, one.kind)
        for one in bucket
    ]
    flat = torch.cat([part.detach().flatten() for part in mine])
    if rank != 0:
        torch.distributed.gather(flat)
        return []
    everyone = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.gather(flat, everyone)
    lengths = [part.numel() for part in mine]
    shards = zip(*(_cut(_to_cpu(theirs), lengths) for theirs in everyone), strict=True)
    return [torch.cat(parts)[: one.numel] for one, parts in zip(bucket, shards, strict=True)]


def _from_fragments(bucket: Sequence[_Wanted], rank: int) -> list[Tensor]:
    """ZeRO-1 and 2: every rank holds some stretch of each tensor, or nothing."""
    sizes = [one.numel for one in bucket]
    whole = torch.zeros(sum(sizes), device=bucket[0].parameter.device)
    for one, place in zip(bucket, _cut(whole, sizes), strict=True):
        mapping: Any = getattr(one.parameter, "_hp_mapping")  # noqa: B009 (DeepSpeed's, unknown to types)
        if mapping is not None:
            where = mapping.lp_fragment_address
            place.narrow(0, where.start, where.numel).copy_(mapping.get_hp_fragment(one.kind))
    torch.distributed.reduce(whole, 0)
    # Each on its own: what is kept of one must not keep them all.
    return [part.clone() for part in _cut(_to_cpu(whole), sizes)] if rank == 0 else []


def _cut(flat: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    ends = itertools.accumulate(lengths)
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def _put(
    engine: Any,
    parameter: torch.nn.Parameter,
    moment: str | None,
    value: Tensor,
    world_size: int,
    rank: int,
) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not _is_sharded(parameter):
        master = _master(engine, parameter)
        with torch.no_grad():
            (master if moment is None else _adam(engine).state[master][moment]).copy_(value)
    elif hasattr(parameter, "ds_id"):
        # Not by safe_set_full_*: it does not pad, and fails where the shape does not divide by the ranks.
        shard: Tensor = getattr(parameter, "ds_tensor")  # noqa: B009 (DeepSpeed's, unknown to types)
        length = shard.numel()
        padded = torch.zeros(length * world_size, device=parameter.device)
        padded[: value.numel()] = value.flatten().to(parameter.device)
        part = padded[rank * length : (rank + 1) * length]
        if moment is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
