"""The two encoders of the Protocol: a network of `clip` or `beats`, frozen, behind numpy arrays."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from crab.encoders.base import DTYPES, architecture_lines, encode_in_batches, torch_device
from crab.encoders.beats import Beats
from crab.encoders.clip import VisionFeatures
from crab.encoders.config import EncoderConfig
from crab.encoders.digest import weights_digest
from crab.encoders.fbank import SAMPLE_RATE_HZ

CLIP_COMPUTE_VERSION = 1
BEATS_COMPUTE_VERSION = 1
"""Raise by one when the same weights and input begin to give other numbers: old entries miss."""

_VISION_FIELDS = (
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "patch_size",
)


class VisionEncoder:
    """Frames uint8 [n, size, size, 3] to {"layer_14": [n, P, D], ...}, float32."""

    stream: Literal["video"] = "video"

    def __init__(self, module: VisionFeatures, config: EncoderConfig) -> None:
        vision = module.config
        self.name = (
            f"{vision.model_type.removesuffix('_vision_model')}-{vision.hidden_size}w-"
            f"{vision.patch_size}p-{vision.image_size}px"
        )
        self.image_size: int = vision.image_size
        # Before the cast: the digest names the weights, the record names the arithmetic.
        self.weights_sha256 = weights_digest(module.used_tensors())
        self._dtype = config.dtype
        self._device = torch_device(config)
        self._batch_size = config.batch_size
        self.module = module.eval().requires_grad_(False).to(self._device, DTYPES[config.dtype])

    def record(self) -> dict[str, Any]:
        vision = self.module.config
        return {
            "architecture": architecture_lines({k: getattr(vision, k) for k in _VISION_FIELDS}),
            "compute_dtype": self._dtype,
            "compute_version": CLIP_COMPUTE_VERSION,
            "image_mean": [repr(value) for value in self.module.mean],
            "image_std": [repr(value) for value in self.module.std],
            "layers": list(self.module.layers),
            "name": self.name,
            "weights_sha256": self.weights_sha256,
        }

    def output_shapes(self, num_items: int) -> dict[str, tuple[int, ...]]:
        shape = (num_items, self.module.num_patches, self.module.config.hidden_size)
        return {f"layer_{layer}": shape for layer in self.module.layers}

    def encode(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Raises ValueError for another size or dtype than uint8 [n, size, size, 3]."""
        if batch.dtype != np.uint8:
            raise ValueError(f"{self.name}: got frames of {batch.dtype}; expected uint8, 0 to 255")
        return encode_in_batches(
            self.module, batch, device=self._device, batch_size=self._batch_size, who=self.name
        )


class AudioEncoder:
    """Segments float32 [n, samples] (mono, 16 kHz) to {"tokens": [n, P, D]}, float32."""

    stream: Literal["audio"] = "audio"
    sample_rate_hz = SAMPLE_RATE_HZ

    def __init__(self, module: Beats, config: EncoderConfig) -> None:
        self.name = f"beats-{module.config.encoder_embed_dim}w-{module.config.encoder_layers}l"
        self.weights_sha256 = weights_digest(module.state_dict())
        self._dtype = config.dtype
        self._device = torch_device(config)
        self._batch_size = config.batch_size
        self.module = module.eval().requires_grad_(False).to(self._device, DTYPES[config.dtype])

    @property
    def min_segment_ms(self) -> int:
        """Shortest segment that fills one row of patches: 175 ms for 16x16 patches."""
        return -(-self.module.config.min_samples() * 1000 // SAMPLE_RATE_HZ)

    def record(self) -> dict[str, Any]:
        return {
            "architecture": architecture_lines(self.module.config.model_dump()),
            "compute_dtype": self._dtype,
            "compute_version": BEATS_COMPUTE_VERSION,
            "layers": [self.module.config.encoder_layers],
            "name": self.name,
            "weights_sha256": self.weights_sha256,
        }

    def output_shapes(self, num_items: int, segment_ms: int = 1000) -> dict[str, tuple[int, ...]]:
        tokens = self.module.config.num_tokens(segment_ms * SAMPLE_RATE_HZ // 1000)
        return {"tokens": (num_items, tokens, self.module.config.encoder_embed_dim)}

    def encode(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """Raises ValueError for another dtype than float32 or segments under `min_segment_ms`."""
        if batch.dtype != np.float32:
            raise ValueError(
                f"{self.name}: got audio of {batch.dtype}; expected float32 in [-1, 1] at "
                f"{SAMPLE_RATE_HZ} Hz"
            )
        return encode_in_batches(
            self._tokens, batch, device=self._device, batch_size=self._batch_size, who=self.name
        )

    def _tokens(self, waveform: Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": self.module(waveform)}
