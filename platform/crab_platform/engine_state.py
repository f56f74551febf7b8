"""What a DeepSpeed engine has learnt, whole: weights in float32 and the moments of Adam, by parameter name.

Engines shard this in ways that depend on the ZeRO stage and on the number of ranks. Put together it fits any of them,
so a run can go on with other workers, and a checkpoint is plain tensors and holds nothing that is frozen.

Adam's state of each parameter is `exp_avg`, `exp_avg_sq` and the number of steps, which is one for all (torch.optim).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"


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
    found: dict[str, Tensor] = {}
    for name, parameter in trained(engine.module).items():
        for kind in (None, *MOMENTS):
            value = _get(engine, parameter, kind)
            if rank == 0:
                found[f"{kind or WEIGHT}/{name}"] = (
                    value.detach().to("cpu", torch.float32, copy=True).view(shape_of(parameter))
                )
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


def _get(engine: Any, parameter: torch.nn.Parameter, moment: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_sharded(parameter):
        master = _master(engine, parameter)
        return master if moment is None else _adam(engine).state[master][moment]
    value: Tensor | None = (
        safe_get_full_fp32_param(parameter)
        if moment is None
        else safe_get_full_optimizer_state(parameter, moment)
    )
    assert value is not None
    return value


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
