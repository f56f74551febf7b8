"""One sample of a sweep: its train spec, and whether that can be trained at all.

Everything here is arithmetic on shapes: no weights are read and nothing is started, so a sample that cannot be is
turned down before anybody waits for a worker. A sample of the tiny preset takes 25 ms of a core, and 5 ms where an
earlier one had the same shapes; of the paper preset 150 ms and 2 ms (medians; the first of all takes 0.2 s).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import ValidationError
from torch import nn

from crab.adapter.targets import name_matches, nearest_names
from crab.model.config import AdapterConfig, CrabConfig
from crab.model.crab_model import CrabModel
from crab.model.meta import DecoderSizes, decoder_sizes, meta_model, with_adapter, with_architecture
from crab_platform.memory import Parameter
from jobs.plan_memory import activations, in_device, model_config, outline, worker_states
from jobs.plan_show import size
from jobs.recipe import micro_batch_size
from jobs.spec import SpecError, TrainSpec, parse_spec, spec_record
from jobs.spec_errors import explain
from jobs.spec_yaml import put
from tune_spaces.space import Space, settings

_ADAPTER = "model.set.adapter"
_IGNORED = {
    "interaction_lora": frozenset[str](),
    "lora": frozenset({"num_heads", "router_temperature"}),
    "none": frozenset(AdapterConfig.model_fields),
}
"""By method, the settings of an adapter that do nothing."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a train spec without starting it."""

    objection: str | None
    """Why it cannot be, and the way out; None where nothing speaks against it."""
    trained_parameters: int
    """Elements of all trained weights; 0 where there is no such model."""
    memory_bytes: int | None
    """ESTIMATE of what one worker holds in the memory that it computes in; None where there is no such model, or its
    activations are unknown (jobs/plan_memory.py says what is counted)."""


@dataclass(frozen=True)
class _Bare:
    """A model without its adapter: what all samples of a sweep over adapters share."""

    model: CrabModel
    others: list[Parameter]
    """All parameters but those of the language model."""
    linears: dict[str, tuple[int, int]]
    """(in, out) of the language model's linear layers, by name."""
    sizes: DecoderSizes | None


def trial_spec(train: TrainSpec, space: Space, config: Mapping[str, Any]) -> TrainSpec:
    """The train spec of one sample: `train` with the values of `config` in their places.

    Args:
        config: parameter of `space` -> value. What it leaves out stays as it is in `train`.

    Raises:
        SpecError: values outside their ranges, or what comes out is no train spec or describes no model, or a parameter
            would do nothing with the adapter's method, which would make its part of the sweep a comparison of noise.
    """
    where = f"sample {dict(config)} of space {space.name}"
    values = spec_record(train)
    try:
        changes = settings(space, config)
    except ValueError as error:
        raise SpecError(f"space {space.name}: {error}") from error
    for path, value in changes.items():
        put(values, path, value, where)
    spec = parse_spec(values, where)
    assert isinstance(spec, TrainSpec)  # another `job` refuses the keys of this one
    try:
        adapter = model_config(spec)[0].adapter
    except ValidationError as error:
        raise SpecError(_no_model(error, spec, where)) from error
    idle = sorted(changes.keys() & {f"{_ADAPTER}.{name}" for name in _IGNORED[adapter.method]})
    if idle and f"{_ADAPTER}.method" not in changes:  # where it is varied, that is what is asked
        raise SpecError(
            f"{where}: {', '.join(idle)} does nothing with {_ADAPTER}.method {adapter.method}; set that to "
            "interaction_lora, or take another space"
        )
    return spec


def examine(spec: TrainSpec, memory_bytes: int | None = None) -> Examined:
    """What a train spec would train and hold, and what speaks against it.

    Args:
        memory_bytes: what one worker has: of its GPU with workers.gpu, of the host's memory without; None: no limit.

    Raises:
        SpecError: of what all samples have in common: the folder of the language model is not there, or the preset is
            damaged.
    """
    try:
        config, _ = model_config(spec)
    except ValidationError as error:
        return _impossible(_no_model(error, spec, spec.name))
    try:
        micro_batch = micro_batch_size(spec)
    except SpecError as error:
        return _impossible(str(error))
    try:
        key = _without_adapter(with_architecture(config))
    except FileNotFoundError as error:
        raise SpecError(f"model: {error}, which the sizes are taken from") from error
    try:
        bare = _bare(key)
        if (objection := _misfit(config.adapter, bare.linears)) is not None:
            return _impossible(objection)
        parameters = _adapted(key, _shape(config.adapter)) + bare.others
    except ValueError as error:
        return _impossible(f"model.set: there is no such model: {error}")
    trained = sum(p.numel for p in parameters if p.is_trained)
    # Where the cluster may give fewer workers, each of them holds more.
    fewest = spec.workers.min_count or spec.workers.count
    states = in_device(worker_states(spec, parameters, fewest), spec.workers.gpu)
    kept = activations(
        spec, config, bare.sizes, micro_batch, checkpointing=spec.workers.activation_checkpointing
    )
    total = states + (kept or 0)
    objection = None
    if memory_bytes is not None and total > memory_bytes:
        adapter = config.adapter
        shapes = [n for n in ("r", "num_heads") if n not in _IGNORED[adapter.method]]
        shown = ", ".join([adapter.method, *(f"{n} {getattr(adapter, n)}" for n in shapes)])
        parts = f"{size(states)} of weights, gradients and Adam's state, activations {size(kept)}"
        objection = (
            f"memory: with {_ADAPTER} {shown} ({trained:,} trained weights) and micro batches of {micro_batch}, "
            f"each of {fewest} workers would hold about {size(total)} ({parts}), more than the {size(memory_bytes)} "
            f"that it has; {_way_out(spec, micro_batch)}"
        )
    return Examined(
        objection=objection,
        trained_parameters=trained,
        memory_bytes=None if kept is None else total,
    )


def _impossible(objection: str) -> Examined:
    sentence = "; ".join(line.strip() for line in objection.splitlines())
    return Examined(objection=sentence, trained_parameters=0, memory_bytes=None)


def _no_model(error: ValidationError, spec: TrainSpec, where: str) -> str:
    """What is wrong with `model.set`, in the words of other mistakes in a spec."""
    return explain(error, spec.model.set, f"{where}: model.set", {}, CrabConfig)


def _misfit(adapter: AdapterConfig, linears: Mapping[str, tuple[int, int]]) -> str | None:
    """Why the adapter does not go onto these layers."""
    if adapter.method == "none":
        return None
    path = f"{_ADAPTER}.target_modules"
    if not adapter.target_modules:
        return f"{path} is empty; name linear layers of the language model, or set {_ADAPTER}.method to none"
    for target in adapter.target_modules:
        layers = {name: shape for name, shape in linears.items() if name_matches(target, name)}
        if not layers:
            return (
                f"{path}: {target!r} matches no linear layer of the language model; nearest are "
                f"{', '.join(nearest_names(target, linears))}"
            )
        name, shape = min(layers.items(), key=lambda layer: min(layer[1]))
        if adapter.r > min(shape):
            return (
                f"{_ADAPTER}.r is {adapter.r}, while no update of {name} ({shape[1]} x {shape[0]}) has a rank above "
                f"{min(shape)}; take r up to {min(shape)}, or leave {target} out of {path}"
            )
    return None


def _way_out(spec: TrainSpec, micro_batch: int) -> str:
    """What takes less memory and is not done yet."""
    ways = {
        "more workers.micro_batches": micro_batch > 1,
        "workers.activation_checkpointing: true": not spec.workers.activation_checkpointing,
        "workers.zero_stage: 3": spec.workers.zero_stage < 3,
        "workers.offload: optimizer": spec.workers.gpu and spec.workers.offload == "none",
        "smaller ranges": True,
    }
    return "try " + ", or ".join(way for way, is_open in ways.items() if is_open)


def _without_adapter(config: CrabConfig) -> str:
    """The same for all samples that differ in their adapter, or in what gives no weight its shape."""
    plain = {"adapter": AdapterConfig(method="none"), "seed": 0, "initial": None}
    return config.model_copy(update=plain).model_dump_json()


def _shape(adapter: AdapterConfig) -> AdapterConfig:
    """What of it gives weights their shapes."""
    kept = {name: getattr(adapter, name) for name in ("method", "num_heads", "r", "target_modules")}
    return AdapterConfig(**kept)


@lru_cache(maxsize=4)
def _bare(config: str) -> _Bare:
    model = meta_model(CrabConfig.model_validate_json(config))
    of_llm = {id(p) for p in model.llm.parameters()}
    return _Bare(
        model,
        outline(p for p in model.parameters() if id(p) not in of_llm),
        {
            name: (module.in_features, module.out_features)
            for name, module in model.llm.named_modules()
            if isinstance(module, nn.Linear)
        },
        decoder_sizes(model),
    )


@lru_cache(maxsize=1024)
def _adapted(bare: str, adapter: AdapterConfig) -> list[Parameter]:
    """The language model's parameters with an adapter."""
    model = _bare(bare).model
    return outline(with_adapter(model, adapter).parameters())
