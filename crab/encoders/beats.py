"""BEATs (https://arxiv.org/abs/2212.09058): log-mel patches through a gated-bias transformer.

A compact implementation of the published network for inference and training, with the parameter
names of Microsoft's checkpoints, so that those load without a table of names. `openbeats` on PyPI
has the same network, but imports torchaudio (whose wheels need a CUDA torch), reads checkpoints
with an unrestricted unpickler and computes the filter bank one waveform at a time; it is our oracle
in tests/numerics/test_beats_parity.py instead. No dropout: it is off at inference, and the tiny
encoder is trained without.

Names: N segments, T samples, L patch tokens, D width, H heads.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from crab.encoders.fbank import (
    FRAME_SAMPLES,
    NUM_MEL_BINS,
    SHIFT_SAMPLES,
    log_mel,
    num_frames,
)

FBANK_MEAN = 15.41663
FBANK_STD = 6.55582
"""AudioSet's statistics, as the published weights expect them; divided by twice the deviation."""

_SUPPORTED = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}


class BeatsConfig(BaseModel):
    """Architecture of a BEATs network. Field names are those of the public checkpoints' "cfg"."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder_layers: int = Field(default=12, ge=1)
    encoder_embed_dim: int = Field(default=768, ge=1)
    encoder_ffn_embed_dim: int = Field(default=3072, ge=1)
    encoder_attention_heads: int = Field(default=12, ge=1)
    embed_dim: int = Field(default=512, ge=1)
    """Width of a patch before it is projected to the transformer's."""
    input_patch_size: int = Field(default=16, ge=1)
    conv_bias: bool = False
    conv_pos: int = Field(default=128, ge=2)
    """Kernel, in tokens, of the convolution that tells tokens where they are."""
    conv_pos_groups: int = Field(default=16, ge=1)
    num_buckets: int = Field(default=320, ge=4)
    max_distance: int = Field(default=800, ge=2)
    deep_norm: bool = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, divisor in (
            ("encoder_attention_heads", self.encoder_attention_heads),
            ("conv_pos_groups", self.conv_pos_groups),
        ):
            if self.encoder_embed_dim % divisor:
                raise ValueError(
                    f"encoder_embed_dim={self.encoder_embed_dim} is not a multiple of "
                    f"{name}={divisor}; change one of them"
                )
        if NUM_MEL_BINS % self.input_patch_size:
            raise ValueError(
                f"input_patch_size={self.input_patch_size} does not divide the {NUM_MEL_BINS} mel "
                "bins; use 8, 16 or 32"
            )
        return self

    @classmethod
    def from_public(cls, cfg: dict[str, Any]) -> Self:
        """Config from a checkpoint's "cfg": keys of training (dropouts, predictor) are left out.

        Raises ValueError for a variant of the architecture that was never published.
        """
        for key, expected in _SUPPORTED.items():
            if key in cfg and cfg[key] != expected:
                raise ValueError(
                    f"the checkpoint has {key}={cfg[key]!r}; only {expected!r} is supported, as in "
                    "Microsoft's BEATs_iter* checkpoints"
                )
        return cls(**{key: cfg[key] for key in cls.model_fields if key in cfg})

    def num_tokens(self, num_samples: int) -> int:
        """Patch tokens of a segment: 48 for one second at 16 kHz, 96 for two."""
        rows = num_frames(num_samples) // self.input_patch_size
        return rows * (NUM_MEL_BINS // self.input_patch_size)

    def min_samples(self) -> int:
        """Shortest segment that fills one row of patches."""
        return FRAME_SAMPLES + (self.input_patch_size - 1) * SHIFT_SAMPLES


class Beats(nn.Module):
    """Waveforms [N, T] (mono, 16 kHz, in [-1, 1]) to tokens [N, L, D], time before frequency."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.input_patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, patch, patch, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj: nn.Module = (
            nn.Linear(config.embed_dim, config.encoder_embed_dim)
            if config.embed_dim != config.encoder_embed_dim
            else nn.Identity()
        )
        self.encoder = BeatsTransformer(config)

    def forward(self, waveform_NT: Tensor) -> Tensor:
        shortest = self.config.min_samples()
        if waveform_NT.ndim != 2 or waveform_NT.shape[1] < shortest:
            raise ValueError(
                f"got audio of shape {tuple(waveform_NT.shape)}; expected [segments, samples] with "
                f"at least {shortest} samples at 16 kHz; pad shorter segments with zeros"
            )
        fbank = (log_mel(waveform_NT) - FBANK_MEAN) / (2 * FBANK_STD)
        image = fbank.to(self.patch_embedding.weight.dtype)[:, None]
        patches_NLD = self.patch_embedding(image).flatten(2).transpose(1, 2)
        tokens_NLD: Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches_NLD)))
        return tokens_NLD


class BeatsTransformer(nn.Module):
    """Convolutional positions, then post-norm layers that share one table of position biases."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(PositionalConv(config), nn.GELU())
        self.layer_norm = nn.LayerNorm(config.encoder_embed_dim)
        self.layers = nn.ModuleList(
            BeatsLayer(config, owns_bias=index == 0) for index in range(config.encoder_layers)
        )

    def forward(self, x_NLD: Tensor) -> Tensor:
        x_NLD = x_NLD + self.pos_conv(x_NLD.transpose(1, 2)).transpose(1, 2)
        x_NLD = self.layer_norm(x_NLD)
        first: Any = self.layers[0]
        bias_HLL = first.self_attn.position_bias(x_NLD.shape[1])
        for layer in self.layers:
            x_NLD = layer(x_NLD, bias_HLL)
        return x_NLD


class PositionalConv(nn.Module):
    """Grouped convolution over tokens, its weight stored as direction and length (weight norm).

    Written out because torch's parametrisation renames the two tensors that checkpoints hold.
    """

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        width, kernel = config.encoder_embed_dim, config.conv_pos
        self.groups = config.conv_pos_groups
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(width, width // self.groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * width)))
        with torch.no_grad():
            self.weight_g.copy_(self._length())

    def _length(self) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        return length

    def forward(self, x_NDL: Tensor) -> Tensor:
        kernel = self.weight_v.shape[-1]
        weight = self.weight_v * (self.weight_g / self._length())
        out = F.conv1d(x_NDL, weight, self.bias, padding=kernel // 2, groups=self.groups)
        # An even kernel padded on both sides yields one token too many, at the end.
        return out[..., : x_NDL.shape[-1]]


class BeatsLayer(nn.Module):
    """Attention and feed-forward, each normed after a residual scaled as DeepNorm has it.

    alpha = (2 * layers) ** (1/4), https://arxiv.org/abs/2203.00555, section 3.
    """

    def __init__(self, config: BeatsConfig, *, owns_bias: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = GatedBiasAttention(config, owns_bias=owns_bias)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = nn.LayerNorm(width)
        if config.deep_norm:
            # The paper shrinks what feeds the residual: beta = (8 * layers) ** (-1/4).
            beta = (8 * config.encoder_layers) ** -0.25
            attention = self.self_attn
            for linear in (attention.v_proj, attention.out_proj, self.fc1, self.fc2):
                nn.init.xavier_normal_(linear.weight, gain=beta)

    def forward(self, x_NLD: Tensor, bias_HLL: Tensor) -> Tensor:
        x_NLD = self.self_attn_layer_norm(x_NLD * self.alpha + self.self_attn(x_NLD, bias_HLL))
        x_NLD = self.final_layer_norm(x_NLD * self.alpha + self.fc2(F.gelu(self.fc1(x_NLD))))
        return x_NLD


class GatedBiasAttention(nn.Module):
    """softmax(q k / sqrt(d) + gate(q) * bias) v: WavLM's gated relative position bias.

    https://arxiv.org/abs/2110.13900, section 2.2.
    """

    def __init__(self, config: BeatsConfig, *, owns_bias: bool) -> None:
        super().__init__()
        width, self.num_heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.num_buckets, self.max_distance = config.num_buckets, config.max_distance
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // self.num_heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, self.num_heads, 1, 1))
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(self.num_buckets, self.num_heads)
            nn.init.xavier_normal_(self.relative_attention_bias.weight)

    def position_bias(self, num_tokens: int) -> Tensor:
        """Bias [H, L, L] by the distance between two tokens, before any gate."""
        buckets = _buckets(num_tokens, self.num_buckets, self.max_distance)
        table = self.relative_attention_bias
        bias_HLL: Tensor = table(buckets.to(table.weight.device)).permute(2, 0, 1)
        return bias_HLL

    def forward(self, x_NLD: Tensor, bias_HLL: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        q, k, v = (
            proj(x_NLD).unflatten(-1, heads).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Eight outputs, four summed for each of the two gates, as the checkpoints have it.
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gates[..., :1], gates[..., 1:]
        scale_NHL1 = update * (reset * self.grep_a - 1.0) + 2.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scale_NHL1 * bias_HLL)
        out_NLD: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out_NLD


@lru_cache(maxsize=32)
def _buckets(num_tokens: int, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket [L, L] of the offset key - query: T5's rule, https://arxiv.org/abs/1910.10683.

    Half of the buckets are for keys to the right; of each half, near distances have one each and
    far ones share them by logarithm. On the CPU, since a logarithm that a GPU rounds differently
    would move a token into the next bucket.
    """
    with torch.inference_mode(False):
        position = torch.arange(num_tokens)
        offset = position[None, :] - position[:, None]
        half = num_buckets // 2
        exact = half // 2
        distance = offset.abs()
        far = (distance.clamp_min(1).float() / exact).log() / math.log(max_distance / exact)
        far_bucket = (exact + (far * (half - exact)).long()).clamp_max(half - 1)
        return torch.where(distance < exact, distance, far_bucket) + (offset > 0) * half
