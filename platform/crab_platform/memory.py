"""What one worker's memory holds while a run trains: arithmetic on counts and on the DeepSpeed configuration.

Model states (weights, gradients, optimizer) are exact up to padding: held against a real engine of two ranks, stages 0,
2 and 3, float32 and bfloat16 (tests/numerics/test_memory_estimate.py). Two figures are not:

- `gathered` is a bound: so much ZeRO-3 may gather ahead (`stage3_max_live_parameters`), or keep because its use in
  backward is near (half of `stage3_max_reuse_distance`, which is the way to the end of forward and back), and one
  parameter more.
- activations are an estimate; see activation_bytes.

Nothing here counts what CUDA, NCCL and the allocator need for themselves, nor copies that live for one operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# DeepSpeed 0.19's own, where a configuration does not say (runtime/zero/config.py).
_REDUCE_BUCKET = 500_000_000
_PERSISTENCE_THRESHOLD = 100_000
_MAX_LIVE = 1_000_000_000
_MAX_REUSE_DISTANCE = 1_000_000_000

_MASTER, _MOMENTS = 4, 8
"""Bytes a trained element: the float32 copy that the optimizer changes, and Adam's two averages."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the model, as far as memory goes."""

    numel: int
    is_trained: bool
    itemsize: int = 4
    """Bytes an element as it was loaded; bfloat16 in DeepSpeed's configuration makes it 2."""


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Bytes on one worker."""

    frozen: int
    """Frozen weights: this worker's shards, and whole those below the persistence threshold."""
    trained: int
    """The same of trained weights."""
    gradients: int
    optimizer: int
    """Float32 copies of trained weights, and Adam's two averages."""
    gathered: int
    """Weights of the other workers' shards that are here for the moment, at most."""
    buffers: int
    """What gradients are collected in on their way to the other workers."""
    host: int = 0
    """What offload put into the host's memory; in none of the others."""

    @property
    def total(self) -> int:
        """Of the worker's device."""
        return (
            self.frozen
            + self.trained
            + self.gradients
            + self.optimizer
            + self.gathered
            + self.buffers
        )


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a language model with gated feed-forward layers (Llama, Qwen2, Mistral and their like)."""

    num_layers: int
    width: int
    inner_width: int
    """Of the feed-forward layers."""
    num_heads: int
    adapter_rows: int = 0
    """Rank and heads of an adapter on all seven linears of a layer; 0 without one."""
    has_dropout: bool = False
    """In the adapter, which keeps a bit for each of its inputs."""


def worker_memory(
    parameters: Iterable[Parameter],
    settings: Mapping[str, Any],
    workers: int,
    *,
    on_gpu: bool,
) -> WorkerMemory:
    """What one of `workers` holds in the middle of a step, activations left out.

    Args:
        parameters: all of the model, tied ones once.
        settings: DeepSpeed's configuration.
        on_gpu: there an empty buffer takes memory; on a CPU only what has been written does.

    Raises:
        ValueError: ZeRO stage 1, or offloading to anything but the host's memory, for which nothing was measured; or no
            worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    zero = settings["zero_optimization"]
    stage = int(zero["stage"])
    offloads = {part: zero.get(f"offload_{part}") for part in ("param", "optimizer")}
    offloads = {part: where["device"] for part, where in offloads.items() if where}
    known = {0: set(), 2: {"optimizer"}, 3: {"optimizer", "param"}}
    if stage not in known or not offloads.keys() <= known[stage] or {*offloads.values()} - {"cpu"}:
        raise ValueError(
            "memory is known for zero stages 0, 2 (with offload_optimizer to cpu or without) and 3 (with offload_param "
            f"as well), not for stage {stage} with offload of {offloads or 'nothing'}"
        )
    is_bf16 = bool(settings["bf16"]["enabled"])
    sizes = [(p.numel, 2 if is_bf16 else p.itemsize, p.is_trained) for p in parameters]
    frozen = [(numel, itemsize) for numel, itemsize, is_trained in sizes if not is_trained]
    trained = [(numel, itemsize) for numel, itemsize, is_trained in sizes if is_trained]
    widest = max((itemsize for _, itemsize in trained), default=4)
    bucket = int(zero.get("reduce_bucket_size", _REDUCE_BUCKET))
    num_trained = sum(numel for numel, _ in trained)
    if stage == 0 or not on_gpu:
        bucket = min(bucket, num_trained)  # flattened when they are sent, or never written
    if stage == 3:
        shard = sum(-(-numel // workers) for numel, _ in trained)
        states = WorkerMemory(
            frozen=_sharded(frozen, zero, workers),
            trained=_sharded(trained, zero, workers),
            gradients=shard * widest,
            optimizer=shard * (_MASTER + _MOMENTS),
            gathered=_gathered(frozen + trained, zero) if workers > 1 else 0,
            buffers=bucket * widest,
        )
        if "optimizer" in offloads:
            # There are gradients as they came and in float32.
            host = states.gradients + states.optimizer + shard * _MASTER
            states = replace(states, gradients=0, optimizer=0, host=host)
        if "param" in offloads:
            states = replace(
                states,
                frozen=_whole_copies(frozen, zero),
                trained=_whole_copies(trained, zero),
                gathered=_gathered(frozen + trained, zero),
                host=states.host + _shards(frozen, workers) + _shards(trained, workers),
            )
        return states
    shard = -(-num_trained // workers) if stage == 2 else num_trained
    if "optimizer" in offloads:
        largest = max((numel for numel, _ in trained), default=0)
        return WorkerMemory(
            frozen=_whole(frozen),
            trained=_whole(trained),
            gradients=0,
            optimizer=0,
            gathered=0,
            # One parameter's gradient goes through two more places on its way to the host, here and there.
            buffers=bucket * widest * (2 if zero.get("overlap_comm") else 1) + largest * widest,
            host=shard * (_MASTER + _MOMENTS + _MASTER + widest) + largest * widest,
        )
    # Without ZeRO a float32 weight is its own master.
    has_master = stage == 2 or is_bf16
    twice = 2 if stage == 2 and zero.get("overlap_comm") else 1
    return WorkerMemory(
        frozen=_whole(frozen),
        trained=_whole(trained),
        gradients=shard * widest,
        optimizer=shard * (_MOMENTS + (_MASTER if has_master else 0)),
        gathered=0,
        buffers=bucket * widest * twice,
    )


def activation_bytes(
    decoder: Decoder, samples: int, length: int, itemsize: int, *, checkpointing: bool
) -> int:
    """ESTIMATE of what the language model keeps for the backward of one micro batch.

    For each layer and each of samples * length positions, with width h, inner width f, a heads, rank and heads of the
    adapter R, and e bytes an element:

        8 h          inputs of both RMSNorms, which compute in float32
        + e 6 h      outputs of both norms; queries, keys, values; output of attention
        + e 4 f      gate, silu(gate), up, and their product
        + e length   the attention mask's row
        + 4 a + 8    log-sum-exp of attention, and one number of each norm
        + e 7 R      what the adapter keeps in rank space (crab/adapter/kernel.py)
        + (6 h + f) / 8 with dropout, a bit for each input of the adapter

    and 4 h once for the last norm. Frozen linears keep nothing. With checkpointing only the input of each layer stays,
    e h, and one layer at a time is whole.

    Source: counted over what autograd saves in transformers 5.23's Llama with our adapter and SDPA on a CPU, layer by
    layer to the byte (tests/numerics/test_memory_estimate.py); the way of counting is that of arXiv 2205.05198, section
    4, whose own formula is for another architecture, trained whole. Where attention needs no mask it is less: no rows
    of it, and keys and values that several heads share are not repeated. Not in it: projectors, mask decoder, logits
    and loss, and gradients of activations. PEFT's LoRA keeps more than our adapter.
    """
    h, f, e = decoder.width, decoder.inner_width, itemsize
    layer = 8 * h + e * (6 * h + 4 * f + length) + 4 * decoder.num_heads + 8
    layer += e * 7 * decoder.adapter_rows
    if decoder.has_dropout:
        layer += (6 * h + f) // 8
    kept = e * h * decoder.num_layers + layer if checkpointing else layer * decoder.num_layers
    return samples * length * (kept + 4 * h)


def _whole(sizes: Iterable[tuple[int, int]]) -> int:
    return sum(numel * itemsize for numel, itemsize in sizes)


def _shards(sizes: Iterable[tuple[int, int]], workers: int) -> int:
    return sum(-(-numel // workers) * itemsize for numel, itemsize in sizes)


def _sharded(sizes: Sequence[tuple[int, int]], zero: Mapping[str, Any], workers: int) -> int:
    """Shards of all, and whole copies of those that ZeRO-3 does not let go of once it has gathered them."""
    # Of one worker the shard is the whole.
    return _shards(sizes, workers) + (_whole_copies(sizes, zero) if workers > 1 else 0)


def _whole_copies(sizes: Iterable[tuple[int, int]], zero: Mapping[str, Any]) -> int:
    threshold = int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    return _whole((numel, itemsize) for numel, itemsize in sizes if numel <= threshold)


def _gathered(sizes: Iterable[tuple[int, int]], zero: Mapping[str, Any]) -> int:
    threshold = int(zero.get("stage3_param_persistence_threshold", _PERSISTENCE_THRESHOLD))
    passing = [(numel, itemsize) for numel, itemsize in sizes if numel > threshold]
    if not passing:
        return 0
    ahead = int(zero.get("stage3_max_live_parameters", _MAX_LIVE))
    kept = int(zero.get("stage3_max_reuse_distance", _MAX_REUSE_DISTANCE)) // 2
    largest = max(numel for numel, _ in passing)
    widest = max(itemsize for _, itemsize in passing)
    return min(_whole(passing), (max(ahead, kept) + largest) * widest)
