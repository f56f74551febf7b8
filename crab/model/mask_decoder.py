"""Mask decoder: what six mask tokens mean, drawn on the frames of their span.

A SAM-style decoder on two scales (arXiv 2304.02643 for the two-way transformer, 2312.02228 for the sum over scales),
as Crab has it: learned queries are turned by the language model's prompt, look at one frame, and each gives one map;
a small head makes masks of the maps. The coarse scale's maps tell the fine scale where to look. The two-way
transformer and the attention are transformers' own.

What differs from Crab's release: the weights of tokens and scales are learned parameters (there they are plain
numbers, neither trained nor saved), every layer of the query generator counts (there only the last one does), and all
frames of all samples go through together.

Three more things are ours, because the rest by itself is slow to learn that a prompt chooses among objects. Prompts are
normalised and start strong; they scale the channels of the features that are looked at (FiLM, arXiv 1709.07871); the
heads see these features beside the maps. Measured on drawn frames with three of twelve kinds of objects, one of them
prompted (tiny sizes, 7 x 7 tokens, 600 steps of 12 new frames, AdamW at 3e-3): IoU of the prompted object on unseen
frames, binary / by class, is 0.24 / 0.00 with normalised prompts alone (0.32 / 0.00 after 1200 steps: all three objects
are drawn), 0.87 / 0.21 without the heads' view, 0.79 / 0.45 without the strong start, 0.27 / 0.00 without the scaling
and the strong start, and 0.93 / 0.94 and 0.94 / 0.83 (two seeds) with all three.

Sizes, for g x g encoder tokens: the coarse scale looks at g x g and gives maps of 2g, the fine scale looks at 2g x 2g
and gives maps of 4g; logits of both are resized to the output size and added. With 16 x 16 (CLIP ViT-L/14) the maps
have 32 and 64 pixels and the output 112, with 14 x 14 (the tiny encoder) 28, 56 and 56.

Legend: G groups of mask tokens, F frames, W width of the LLM, Q queries, E width here, P = g * g encoder tokens,
D feature width, H map width, C classes, S side of the output.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import (
    SamAttention,
    SamFeedForward,
    SamLayerNorm,
    SamMLPBlock,
    SamTwoWayTransformer,
)

from crab.model.config import MaskDecoderConfig

NUM_SCALES = 2
PROMPT_GAIN = 3.0
"""First size of a prompt, beside queries of size 1."""


class MaskDecoder(nn.Module):
    def __init__(self, config: MaskDecoderConfig, llm_width: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.llm_width = llm_width
        norm = nn.LayerNorm(width)
        nn.init.constant_(norm.weight, PROMPT_GAIN)
        self.prompt_mlp = nn.Sequential(
            nn.Linear(llm_width, llm_width), nn.ReLU(), nn.Linear(llm_width, width), norm
        )
        self.token_weights = nn.Parameter(
            torch.full((NUM_SCALES, config.tokens_per_scale), 1 / config.tokens_per_scale)
        )
        self.query_generator = QueryGenerator(config)
        self.level_embeddings = nn.Parameter(torch.randn(NUM_SCALES, width) * 0.02)
        self.no_mask_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.coarse = MaskScale(config, upsample=False)
        self.fine = MaskScale(config, upsample=True)
        self.binary_head = nn.Conv2d(config.map_width, 1, 1)
        self.class_head = nn.Conv2d(config.map_width, config.num_classes, 1)
        self.scale_weights = nn.Parameter(torch.full((NUM_SCALES,), 1 / NUM_SCALES))
        self.frequencies: Tensor
        self.register_buffer("frequencies", _frequencies(width), persistent=False)

    def forward(
        self, prompts: Tensor, features: Mapping[str, Tensor], group_of_frame: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw each frame as its group asks.

        Args:
            prompts: [G, 6, W], the LLM's hidden states that predict <mask_0> ... <mask_5>.
            features: layer name -> [F, P, D], for both of config.layers.
            group_of_frame: int64 [F], which of the G groups a frame belongs to.

        Returns:
            Logits of the binary mask [F, S, S] and of the classes [F, C, S, S].

        Raises:
            ValueError: the number of encoder tokens is not a square.
        """
        coarse, fine = (_as_image(features[layer]) for layer in self.config.layers)
        prompts = self.prompt_mlp(prompts.to(self.token_weights.dtype))
        by_scale = prompts.unflatten(1, (NUM_SCALES, self.config.tokens_per_scale))
        prompt_of_scale = torch.einsum("gste,st->gse", by_scale, self.token_weights)
        # Both scales in one call; a group's queries serve all its frames.
        queries = self.query_generator(prompt_of_scale.flatten(0, 1))
        queries = queries.unflatten(0, (-1, NUM_SCALES))[group_of_frame]
        prompt = prompt_of_scale[group_of_frame]

        coarse, fine = coarse.to(prompts.dtype), fine.to(prompts.dtype)
        maps, hidden = self.coarse(
            coarse, prompt[:, 0], queries[:, 0], self._extras(0), self.frequencies
        )
        focus = maps.mean(1, keepdim=True).sigmoid() + 1
        drawn = [self._heads(hidden)]
        _, hidden = self.fine(
            fine, prompt[:, 1], queries[:, 1], self._extras(1), self.frequencies, focus
        )
        drawn.append(self._heads(hidden))
        size = (self.config.output_size, self.config.output_size)
        total = sum(
            weight * F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            for weight, logits in zip(self.scale_weights, drawn, strict=True)
        )
        assert isinstance(total, Tensor)
        return total[:, 0], total[:, 1:]

    def _extras(self, scale: int) -> Tensor:
        """What is added to every place of a scale: its level, and "no mask was given" (SAM's dense prompt). [E]"""
        return self.level_embeddings[scale] + self.no_mask_embedding

    def _heads(self, hidden: Tensor) -> Tensor:
        """[F, H, s, s] -> [F, 1 + C, s, s]. Both heads always run: every parameter takes part in every pass."""
        return torch.cat([self.binary_head(hidden), self.class_head(hidden)], dim=1)


class QueryGenerator(nn.Module):
    """Learned queries, turned by a prompt: layers of self-attention, attention to the prompt, and an MLP."""

    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.width))
        self.layers = nn.ModuleList(_QueryLayer(config) for _ in range(config.num_query_layers))

    def forward(self, prompts: Tensor) -> Tensor:
        """One prompt a row [G, E] -> [G, Q, E]."""
        queries = self.queries.expand(len(prompts), 1, -1, -1)
        for layer in self.layers:
            queries = layer(queries, prompts[:, None, None])
        return queries[:, 0]


class _QueryLayer(nn.Module):
    def __init__(self, config: MaskDecoderConfig) -> None:
        super().__init__()
        sam = _sam_config(config)
        self.self_attention = SamAttention(sam, downsample_rate=1)
        self.prompt_attention = SamAttention(sam, downsample_rate=1)
        self.mlp = SamMLPBlock(sam)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(3))

    def forward(self, queries: Tensor, prompt: Tensor) -> Tensor:
        """[G, 1, Q, E] and [G, 1, 1, E] -> [G, 1, Q, E]; the second axis is SAM's and not used here."""
        queries = self.norms[0](queries + self.self_attention(queries, queries, queries)[0])
        queries = self.norms[1](queries + self.prompt_attention(queries, prompt, prompt)[0])
        out: Tensor = self.norms[2](queries + self.mlp(queries))
        return out


class MaskScale(nn.Module):
    """One scale: features of a frame and queries in, one map a query and the hidden maps for the heads out."""

    def __init__(self, config: MaskDecoderConfig, *, upsample: bool) -> None:
        super().__init__()
        width, narrow = config.width, config.map_width
        self.neck = nn.Sequential(
            nn.Conv2d(config.feature_size, width, 1, bias=False),
            SamLayerNorm(width, data_format="channels_first"),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            SamLayerNorm(width, data_format="channels_first"),
        )
        self.prompt_scaling = nn.Linear(width, width)
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2) if upsample else nn.Identity()
        self.transformer = SamTwoWayTransformer(_sam_config(config))
        self.query_mlp = SamFeedForward(width, width, narrow, 3)
        self.enlarge = nn.Sequential(nn.ConvTranspose2d(width, narrow, 2, stride=2), nn.GELU())
        self.map_mlp = nn.Sequential(
            nn.Conv2d(config.num_queries, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, narrow, 1),
        )

    def forward(
        self,
        image: Tensor,
        prompt: Tensor,
        queries: Tensor,
        extra: Tensor,
        frequencies: Tensor,
        focus: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """image [F, D, g, g], prompt [F, E], queries [F, Q, E], extra [E], focus [F, 1, ., .] (a factor for each place,
        resized to fit) -> maps [F, Q, s, s] and hidden [F, H, s, s].
        """
        image = self.neck(image) * (1 + self.prompt_scaling(prompt))[:, :, None, None]
        image = self.upsample(image) + extra[:, None, None]
        side = image.shape[-1]
        if focus is not None:
            image = image * F.interpolate(
                focus, size=(side, side), mode="bilinear", align_corners=False
            )
        places = fourier_positions(side, frequencies).to(image.dtype)
        queries, seen = self.transformer(
            point_embeddings=queries.unsqueeze(1),
            image_embeddings=image,
            image_positional_embeddings=places.unsqueeze(0),
            attention_similarity=None,
        )
        seen = seen[:, 0].transpose(1, 2).unflatten(2, (side, side))
        places_seen = self.enlarge(seen)
        maps = torch.einsum("fqe,fehw->fqhw", self.query_mlp(queries[:, 0]), places_seen)
        return maps, self.map_mlp(maps) + places_seen


def fourier_positions(side: int, frequencies: Tensor) -> Tensor:
    """SAM's random Fourier features of the places of a side x side image: [E, side, side], float32."""
    centres = (torch.arange(side, device=frequencies.device, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    angle = 2 * math.pi * (2 * torch.stack([x, y], dim=-1) - 1) @ frequencies.float()
    return torch.cat([angle.sin(), angle.cos()], dim=-1).permute(2, 0, 1)


def _frequencies(width: int) -> Tensor:
    """[2, width / 2] ~ N(0, 1), the same in every process: they are not trained and not saved."""
    key = int.from_bytes(hashlib.sha256(b"crab mask positions 1").digest()[:16])
    values = np.random.Generator(np.random.Philox(key=key)).normal(size=(2, width // 2))
    return torch.from_numpy(values.astype(np.float32)).to(torch.empty(0).device)


def _as_image(features: Tensor) -> Tensor:
    """[F, g * g, D] -> [F, D, g, g]."""
    side = math.isqrt(features.shape[1])
    if side * side != features.shape[1]:
        raise ValueError(
            f"masks are drawn on a square of encoder tokens, got {features.shape[1]} tokens a frame"
        )
    return features.transpose(1, 2).unflatten(2, (side, side))


def _sam_config(config: MaskDecoderConfig) -> SamMaskDecoderConfig:
    sam = SamMaskDecoderConfig(
        hidden_size=config.width,
        hidden_act="relu",
        mlp_dim=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        attention_downsample_rate=2,
    )
    sam._attn_implementation = "sdpa"
    return sam
