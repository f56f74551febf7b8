"""What a train job needs of each worker's memory, by the number of workers: part of `crab plan`.

Imports torch, which other plans do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from crab.model.config import CrabConfig, LlmConfig, paper
from crab.model.meta import DecoderSizes, decoder_sizes, meta_model
from crab_platform.memory import Decoder, Parameter, WorkerMemory, activation_bytes, worker_memory
from crab_platform.training_config import TrainingConfig, deepspeed_config
from jobs.output import line, table
from jobs.plan_show import size
from jobs.presets import crab_model_config
from jobs.spec import TrainSpec

_WORKERS = (1, 2, 4, 8, 16)
_ANY_FOLDER = "/where/the/weights/are"
_NOT_COUNTED = "not counted: activations of projectors, mask decoder and loss; what CUDA, NCCL and the allocator keep"
_ROWS = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered": "gathered, at most",
    "buffers": "gradient buffers",
    "together": "together",
    "host": "offloaded to the host",
    "activations": "activations, about",
    "activations_checkpointed": "with checkpointing",
}
_ACTIVATIONS = ("activations", "activations_checkpointed")


def memory_of(spec: TrainSpec) -> dict[str, Any]:
    """Bytes of each worker for several numbers of workers, as plain values; from configurations, without weights."""
    config, notes = model_config(spec)
    try:
        model = meta_model(config)
    except FileNotFoundError as error:
        return {"unknown": f"{error}, which the sizes are taken from"}
    parameters, sizes = outline(model.parameters()), decoder_sizes(model)
    by_workers = [
        _of_worker(spec, config, parameters, sizes, count)
        for count in sorted({*_WORKERS, spec.workers.count})
    ]
    if any(column["micro_batch"] is None for column in by_workers):
        notes.append(
            f"-: batch_size {spec.optimisation.batch_size} does not divide by so many workers x "
            f"{spec.workers.micro_batches} micro batches"
        )
    return {
        "zero_stage": spec.workers.zero_stage,
        "offload": spec.workers.offload,
        "activation_checkpointing": spec.workers.activation_checkpointing,
        "dtype": spec.optimisation.dtype,
        "device": "GPU" if spec.workers.gpu else "CPU",
        "trained": sum(p.numel for p in parameters if p.is_trained),
        "frozen": sum(p.numel for p in parameters if not p.is_trained),
        "length": config.prompt.max_length,
        "by_workers": by_workers,
        "notes": notes,
    }


def show_memory(memory: Mapping[str, Any]) -> None:
    """The same for people."""
    if "unknown" in memory:
        line(f"memory: unknown: {memory['unknown']}")
        return
    columns = memory["by_workers"]
    stage = f"ZeRO-{memory['zero_stage']}" if memory["zero_stage"] else "no ZeRO"
    total = memory["trained"] + memory["frozen"]
    in_force = "activations_checkpointed" if memory["activation_checkpointing"] else "activations"
    rows = {
        name: (
            title + (", as set" if name == in_force else ""),
            *(size(column[name]) if column[name] is not None else "-" for column in columns),
        )
        for name, title in _ROWS.items()
        if name != "host" or memory["offload"] != "none"
    }
    samples = ("samples at a time", *(str(column["micro_batch"] or "-") for column in columns))
    table(
        f"memory of each {memory['device']} worker ({stage}, {memory['dtype']}; {memory['trained']:,} of {total:,} "
        "weights are trained)",
        ("workers", *(str(column["workers"]) for column in columns)),
        [row for name, row in rows.items() if name not in _ACTIVATIONS]
        + [samples, *(rows[name] for name in _ACTIVATIONS)],
    )
    line(
        f"activations: of the language model, if every sample has all {memory['length']:,} positions of "
        f"prompt.max_length; {_NOT_COUNTED}"
    )
    for note in memory["notes"]:
        line(note)


def outline(parameters: Iterable[nn.Parameter]) -> list[Parameter]:
    """Of a model's parameters, also on the meta device, what their memory depends on."""
    return [
        Parameter(numel=p.numel(), is_trained=p.requires_grad, itemsize=p.element_size())
        for p in parameters
    ]


def model_config(spec: TrainSpec) -> tuple[CrabConfig, list[str]]:
    """The model of a spec, and what is to be said about it.

    Of the paper preset the sizes are known where its language model is not at hand.
    """
    folder = spec.model.llm
    if spec.model.preset != "paper" or (folder and (Path(folder) / "config.json").is_file()):
        return crab_model_config(spec.model), []
    config = crab_model_config(spec.model.model_copy(update={"llm": folder or _ANY_FOLDER}))
    if config.llm.path not in (folder, _ANY_FOLDER):
        return config, []  # model.set names another
    llm = LlmConfig(architecture=paper().llm.architecture, dtype=config.llm.dtype)
    where = f"{folder} is not here" if folder else "model.llm names no folder"
    return config.model_copy(update={"llm": llm}), [f"{where}: sizes are those of Llama-2-7B"]


def worker_states(spec: TrainSpec, parameters: Iterable[Parameter], count: int) -> WorkerMemory:
    """What each of `count` workers holds of a model with these parameters, activations left out."""
    settings = deepspeed_config(
        TrainingConfig(
            name=spec.name,
            storage_path=str(spec.folder),
            num_workers=count,
            use_gpu=spec.workers.gpu,
            micro_batches=spec.workers.micro_batches,
            zero_stage=spec.workers.zero_stage,
            offload=spec.workers.offload,
            dtype=spec.optimisation.dtype,
        )
    )
    return worker_memory(parameters, settings, count, on_gpu=spec.workers.gpu)


def in_device(states: WorkerMemory, on_gpu: bool) -> int:
    """Bytes of `states` in the memory that a worker computes in: without a GPU the host's is the worker's."""
    return states.total + (0 if on_gpu else states.host)


def _of_worker(
    spec: TrainSpec,
    config: CrabConfig,
    parameters: list[Parameter],
    sizes: DecoderSizes | None,
    count: int,
) -> dict[str, Any]:
    samples, left = divmod(spec.optimisation.batch_size, count * spec.workers.micro_batches)
    micro_batch = samples if samples and not left else None
    return {
        "workers": count,
        **_bytes(worker_states(spec, parameters, count), spec.workers.gpu),
        "micro_batch": micro_batch,
        "activations": activations(spec, config, sizes, micro_batch, checkpointing=False),
        "activations_checkpointed": activations(
            spec, config, sizes, micro_batch, checkpointing=True
        ),
    }


def _bytes(states: WorkerMemory, on_gpu: bool) -> dict[str, int]:
    return {
        "frozen": states.frozen,
        "trained": states.trained,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "gathered": states.gathered,
        "buffers": states.buffers,
        "together": in_device(states, on_gpu),
        "host": states.host,
    }


def activations(
    spec: TrainSpec,
    config: CrabConfig,
    sizes: DecoderSizes | None,
    samples: int | None,
    *,
    checkpointing: bool,
) -> int | None:
    """ESTIMATE in bytes of what a micro batch of `samples` keeps for backward, as if all linears were adapted.

    None where the batch does not divide by the workers, or the language model is of another kind.
    """
    if samples is None or sizes is None:
        return None
    adapter = config.adapter
    decoder = Decoder(
        **asdict(sizes),
        adapter_rows={
            "interaction_lora": adapter.r + adapter.num_heads,
            "lora": adapter.r,
            "none": 0,
        }[adapter.method],
        has_dropout=adapter.method != "none" and adapter.lora_dropout > 0,
    )
    # As the language model was loaded, unless DeepSpeed makes bfloat16 of it.
    is_wide = "float32" == config.llm.dtype == spec.optimisation.dtype
    return activation_bytes(
        decoder,
        samples,
        config.prompt.max_length,
        4 if is_wide else 2,
        checkpointing=checkpointing,
    )
