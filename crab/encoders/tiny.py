"""Small relatives of the real encoders, for laptops and tests, and the way to make and save any.

Same code, same file layout and same loader as the real ones, only smaller: a 112-pixel CLIP tower
(196 patches, 0.5 M parameters) and a BEATs with 3 layers (0.4 M). `build_random` gives a module that
can be trained; `save_encoder` writes the folder that `load_encoder` reads.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from crab.encoders.beats import Beats, BeatsConfig
from crab.encoders.beats_checkpoint import save_beats
from crab.encoders.clip import DEFAULT_STATISTICS, VisionFeatures, quiet_transformers
from crab.encoders.config import TINY_SELECT_LAYERS


def tiny_clip_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=112,
        patch_size=8,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=96,
    )


def tiny_beats_config() -> BeatsConfig:
    return BeatsConfig(
        encoder_layers=3,
        encoder_embed_dim=96,
        encoder_ffn_embed_dim=384,
        encoder_attention_heads=4,
        embed_dim=64,
        conv_pos=32,
        conv_pos_groups=4,
        num_buckets=64,
        max_distance=160,
    )


def build_random(
    config: CLIPVisionConfig | SiglipVisionConfig | BeatsConfig,
    seed: int,
    select_layers: tuple[int, ...] = TINY_SELECT_LAYERS,
) -> VisionFeatures | Beats:
    """A trainable network with random weights; the same seed gives the same weights.

    `select_layers` are the hidden states that a vision network returns; BEATs has no choice.
    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, BeatsConfig):
            return Beats(config)
        tower: nn.Module = (
            SiglipVisionModel(config)
            if isinstance(config, SiglipVisionConfig)
            else CLIPVisionModel(config)
        )
        return VisionFeatures(tower, select_layers)


def save_encoder(
    module: VisionFeatures | Beats, folder: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json and model.safetensors (and the image statistics) for `load_encoder`.

    `dtype` is what the files hold; float16 halves them. The module itself is not changed.
    """
    if isinstance(module, Beats):
        save_beats(module, folder, dtype=dtype)
        return
    if module.config.model_type not in DEFAULT_STATISTICS:
        raise ValueError(f"cannot save {module.config.model_type!r}; expected CLIP or SigLIP")
    state = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in module.tower.state_dict().items()
    }
    with quiet_transformers():
        module.tower.save_pretrained(folder, state_dict=state)
    statistics = {"image_mean": module.mean, "image_std": module.std, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics, indent=2) + "\n")
