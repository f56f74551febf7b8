"""The Encoder Protocol: frozen networks that turn decoded media into features.

An encoder is asked for three things: what it is (`record`, which goes into the key of every cached
feature), what it makes (`output_shapes`), and to make it (`encode`). Everything that changes the
numbers beyond rounding is in the record; where it runs (device, batch size, path of the weights) is
not. The arithmetic's dtype changes the numbers (bfloat16 keeps 8 bits), so it counts as identity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from crab.encoders.config import EncoderConfig

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def torch_device(config: EncoderConfig) -> torch.device:
    """The device that a config names."""
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@runtime_checkable
class Encoder(Protocol):
    """A frozen encoder of one stream. See the module docstring for what `record` may hold."""

    @property
    def name(self) -> str: ...

    @property
    def stream(self) -> Literal["video", "audio"]: ...

    @property
    def weights_sha256(self) -> str: ...

    def record(self) -> dict[str, Any]:
        """Identity for the cache key: strings, ints and lists of them."""
        ...

    def output_shapes(self, num_items: int) -> dict[str, tuple[int, ...]]:
        """Shape of each array that `encode` returns for `num_items` frames or segments."""
        ...

    def encode(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Frames or segments of one clip in, float32 arrays [n, patches, width] out."""
        ...


def architecture_lines(fields: Mapping[str, object]) -> list[str]:
    """Settings that change outputs but leave no trace in the weights, as sorted "key=value"."""
    return sorted(f"{key}={json.dumps(value)}" for key, value in fields.items())


@contextmanager
def full_float32() -> Iterator[None]:
    """On NVIDIA GPUs torch rounds the inputs of float32 convolutions to TF32 (10 bits) unless told
    not to, and those of matrix products where a program asked for it. Features from a GPU and from
    a CPU must be interchangeable: their key is the same."""
    backends: Any = torch.backends
    settings = [backends.cudnn.conv, backends.cuda.matmul]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def encode_in_batches(
    forward: Callable[[Tensor], dict[str, Tensor]],
    items: np.ndarray,
    *,
    device: torch.device,
    batch_size: int,
    who: str,
) -> dict[str, np.ndarray]:
    """Run `forward` on slices of `items` without gradients and join the results on the host.

    Raises FloatingPointError when a result is not finite: an infinity in the cache would poison
    every later training run, and in float16 a large activation is enough to make one.
    """
    if len(items) == 0:
        raise ValueError(f"{who}: got an empty batch; give at least one frame or segment")
    parts: dict[str, list[np.ndarray]] = {}
    with torch.inference_mode(), full_float32():
        for start in range(0, len(items), batch_size):
            # A copy: torch warns when it wraps read-only arrays, such as Ray's shared memory.
            chunk = torch.tensor(items[start : start + batch_size], device=device)
            for key, output in forward(chunk).items():
                parts.setdefault(key, []).append(output.float().cpu().numpy())
    joined = {key: np.concatenate(values) for key, values in parts.items()}
    for key, value in joined.items():
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f"{who}: output {key!r} holds values that are not finite; check the input for NaN, "
                "and use dtype bfloat16 or float32 instead of float16"
            )
    return joined
