"""The CLIP and SigLIP path against transformers' own `hidden_states` of the whole, uncut model.

Random weights, made by transformers itself and saved as it saves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from crab.encoders.load import load_encoder

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


def small(**changes: Any) -> dict[str, Any]:
    return {
        "image_size": 64,
        "patch_size": 16,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        **changes,
    }


def frames(num: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), dtype=np.uint8)


def pixel_values(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> torch.Tensor:
    scaled = images.astype(np.float32) / np.float32(255)
    return torch.from_numpy(((scaled - mean) / std).transpose(0, 3, 1, 2).copy())


def save(model: Any, folder: Path) -> Any:
    model.eval().save_pretrained(folder)
    return model


def config(folder: Path, layers: list[int], **changes: Any) -> dict[str, Any]:
    return {
        "kind": "clip",
        "path": str(folder),
        "select_layers": layers,
        "device": "cpu",
        **changes,
    }


def worst_difference(ours: dict[str, np.ndarray], theirs: Any, skip: int) -> float:
    return max(
        float(np.abs(value - theirs[int(key.removeprefix("layer_"))][:, skip:].numpy()).max())
        for key, value in ours.items()
    )


def test_small_clip_equals_transformers_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save(CLIPVisionModel(CLIPVisionConfig(**small())), tmp_path)
    images = frames(5, 64)
    with torch.inference_mode():
        theirs = model(pixel_values(images, CLIP_MEAN, CLIP_STD), output_hidden_states=True)
    encoder = load_encoder(config(tmp_path, [0, 2, 5, 6]))
    ours = encoder.encode(images)
    assert list(ours) == ["layer_0", "layer_2", "layer_5", "layer_6"]
    assert {key: value.shape for key, value in ours.items()} == encoder.output_shapes(5)
    assert worst_difference(ours, theirs.hidden_states, skip=1) == 0.0


def test_real_shape_equals_transformers(tmp_path: Path) -> None:
    """ViT-L/14 at 224 pixels, with 4 layers instead of 24."""
    torch.manual_seed(1)
    shape = CLIPVisionConfig(
        image_size=224,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
    )
    model = save(CLIPVisionModel(shape), tmp_path)
    images = frames(2, 224)
    with torch.inference_mode():
        theirs = model(pixel_values(images, CLIP_MEAN, CLIP_STD), output_hidden_states=True)
    ours = load_encoder(config(tmp_path, [1, 2, 3])).encode(images)
    assert ours["layer_3"].shape == (2, 256, 1024)
    # Measured 0.0; the bound leaves room for a BLAS that picks its kernels by address.
    assert worst_difference(ours, theirs.hidden_states, skip=1) <= 1e-5


def test_whole_clip_checkpoint_gives_the_same_tower(tmp_path: Path) -> None:
    """A checkpoint with its text tower, as openai/clip-vit-large-patch14 is published."""
    torch.manual_seed(2)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 99}  # fmt: skip
    model = save(CLIPModel(CLIPConfig(text_config=text, vision_config=small())), tmp_path / "whole")
    model.vision_model.save_pretrained(tmp_path / "vision")
    images = frames(3, 64)
    whole = load_encoder(config(tmp_path / "whole", [2, 5]))
    vision = load_encoder(config(tmp_path / "vision", [2, 5]))
    assert whole.record() == vision.record()
    with torch.inference_mode():
        theirs = model.vision_model(
            pixel_values(images, CLIP_MEAN, CLIP_STD), output_hidden_states=True
        )
    assert worst_difference(whole.encode(images), theirs.hidden_states, skip=1) == 0.0


def test_siglip_keeps_every_token(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = save(SiglipVisionModel(SiglipVisionConfig(**small())), tmp_path)
    images = frames(4, 64)
    half = np.full(3, 0.5, dtype=np.float32)
    with torch.inference_mode():
        theirs = model(pixel_values(images, half, half), output_hidden_states=True)
    ours = load_encoder(config(tmp_path, [3, 6])).encode(images)
    assert ours["layer_6"].shape == (4, 16, 48)
    assert worst_difference(ours, theirs.hidden_states, skip=0) == 0.0


def test_statistics_of_the_image_processor_are_used(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = save(CLIPVisionModel(CLIPVisionConfig(**small())), tmp_path)
    plain = load_encoder(config(tmp_path, [6]))
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    images = frames(2, 64)
    mean = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    std = np.array([0.4, 0.5, 0.6], dtype=np.float32)
    with torch.inference_mode():
        theirs = model(pixel_values(images, mean, std), output_hidden_states=True)
    encoder = load_encoder(config(tmp_path, [6]))
    assert worst_difference(encoder.encode(images), theirs.hidden_states, skip=1) == 0.0
    assert encoder.record() != plain.record()


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_is_close_and_has_its_own_identity(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    torch.manual_seed(5)
    save(CLIPVisionModel(CLIPVisionConfig(**small())), tmp_path)
    images = frames(3, 64)
    exact, half = (load_encoder(config(tmp_path, [5], dtype=d)) for d in ("float32", dtype))
    difference = np.abs(exact.encode(images)["layer_5"] - half.encode(images)["layer_5"]).max()
    # Measured 0.041 (bfloat16) and 0.0053 (float16); the values' standard deviation is 1.1.
    assert 0 < difference <= tolerance
    assert exact.weights_sha256 == half.weights_sha256
    assert exact.record() != half.record()
