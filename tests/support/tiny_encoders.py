"""Encoders of a few thousand weights with random numbers, in folders that `load_encoder` reads."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import CLIPVisionConfig

from crab.encoders.beats import BeatsConfig
from crab.encoders.tiny import build_random, save_encoder


def vision_folder(
    folder: Path, *, seed: int = 0, size: int = 32, act: str = "quick_gelu", mean: float = 0.5
) -> Path:
    """A CLIP tower with two layers."""
    config = CLIPVisionConfig(
        image_size=size,
        patch_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        hidden_act=act,
    )
    save_encoder(build_random(config, seed=seed, select_layers=(2,)), folder)
    statistics = {"image_mean": [mean] * 3, "image_std": [0.25] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
    return folder


def hearing_folder(folder: Path, *, seed: int = 0, layers: int = 1, max_distance: int = 32) -> Path:
    """A BEATs network with a layer or two."""
    config = BeatsConfig(
        encoder_layers=layers,
        encoder_embed_dim=32,
        encoder_ffn_embed_dim=64,
        encoder_attention_heads=2,
        embed_dim=16,
        conv_pos=8,
        conv_pos_groups=2,
        num_buckets=16,
        max_distance=max_distance,
    )
    save_encoder(build_random(config, seed=seed), folder)
    return folder
