"""CLIP and SigLIP vision towers through transformers, several hidden layers kept.

Layers after the last one that is kept are not built at all (Crab keeps 14, 22 and 23 of ViT-L/14's
24). Frames travel to the device as uint8, a quarter of the bytes, and are normalised there.

Names: N frames, H x W pixels, P patches, D width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from crab.encoders.weights import require_safetensors

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
DEFAULT_STATISTICS = {
    "clip_vision_model": (_CLIP_MEAN, _CLIP_STD),
    "siglip_vision_model": (_HALF, _HALF),
}
"""Mean and deviation per colour, for checkpoints without preprocessor_config.json."""

_UNUSED_PREFIXES = ("post_layernorm.", "head.")
"""Parts of the towers that come after the last hidden state."""


class VisionFeatures(nn.Module):
    """Frames [N, H, W, 3] (0 to 255) to {"layer_14": [N, P, D], ...}; differentiable.

    `layers` are indices into transformers' `hidden_states`; the class token of CLIP is dropped.
    """

    def __init__(
        self,
        tower: Any,
        layers: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.config: Any = tower.config
        self.layers = resolve_layers(layers, self.config.num_hidden_layers)
        default_mean, default_std = DEFAULT_STATISTICS[self.config.model_type]
        self.mean, self.std = tuple(mean or default_mean), tuple(std or default_std)
        self.num_prefix_tokens = 1 if self.config.model_type == "clip_vision_model" else 0

    @property
    def num_patches(self) -> int:
        return int(self.config.image_size // self.config.patch_size) ** 2

    def forward(self, frames_NHWC: Tensor) -> dict[str, Tensor]:
        size = self.config.image_size
        if frames_NHWC.ndim != 4 or frames_NHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"got frames of shape {tuple(frames_NHWC.shape)}; this encoder expects "
                f"[frames, {size}, {size}, 3]; decode at its image_size"
            )
        pixels = self.normalise(frames_NHWC)
        weight: Tensor = next(self.tower.parameters())
        out = self.tower(
            pixel_values=pixels.to(weight.dtype),
            # A list keeps the other layers' activations from being held (0.8 GB for 32 frames).
            output_hidden_states=list(self.layers),
        )
        return {
            f"layer_{layer}": out.hidden_states[layer][:, self.num_prefix_tokens :]
            for layer in self.layers
        }

    def normalise(self, frames_NHWC: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], float32, as the checkpoint's image processor makes them."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=frames_NHWC.device)
            for values in (self.mean, self.std)
        )
        return ((frames_NHWC.float() / 255.0 - mean) / std).permute(0, 3, 1, 2).contiguous()

    def used_tensors(self) -> dict[str, Tensor]:
        """Weights that the kept layers depend on, under names that do not move with transformers
        (whose version 5 dropped a prefix)."""
        state = {
            name.removeprefix("vision_model."): value
            for name, value in self.tower.state_dict().items()
        }
        unused = tuple(
            f"encoder.layers.{index}."
            for index in range(max(self.layers), self.config.num_hidden_layers)
        )
        return {k: v for k, v in state.items() if not k.startswith(_UNUSED_PREFIXES + unused)}


def load_vision(folder: Path, select_layers: Sequence[int]) -> VisionFeatures:
    """CLIP or SigLIP vision tower, float32 on the CPU, cut after the last kept layer.

    `folder` may hold the vision tower alone or a whole checkpoint with its text tower. Raises
    ValueError for pickled weights, other kinds of model, missing weights and layers out of range.
    """
    require_safetensors(folder)
    if (folder / "adapter_config.json").exists():
        # transformers would put it into the tower (or load another folder that it names), by a scale in no tensor.
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json); merge it into model.safetensors "
            "(peft: merge_and_unload) and remove it, so that the weights alone say what is computed"
        )
    config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    config = getattr(config, "vision_config", config)
    if config.model_type not in DEFAULT_STATISTICS:
        raise ValueError(
            f"{folder} holds a {config.model_type!r} model; expected one of "
            f"{sorted(DEFAULT_STATISTICS)} or a whole CLIP or SigLIP checkpoint"
        )
    layers = resolve_layers(select_layers, config.num_hidden_layers)
    # At least one: transformers records the embeddings as the input of the first layer.
    config.num_hidden_layers = max(1, *layers)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    with quiet_transformers():
        tower, report = transformers.AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    missing = sorted(
        key
        for key in report["missing_keys"]
        if not key.removeprefix("vision_model.").startswith(_UNUSED_PREFIXES)
    )
    if missing:
        # transformers only warns, and goes on with random numbers in their place.
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of its own config, first {missing[:3]}; "
            "the checkpoint is incomplete or belongs to another config.json"
        )
    mean, std = _image_statistics(folder, config.model_type)
    return VisionFeatures(tower, layers, mean, std)


def resolve_layers(select_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Sorted, non-negative indices into `hidden_states`, which has num_layers + 1 entries.

    Negative indices count from the end, as in Crab's older settings. ValueError for the rest.
    """
    wrong = [layer for layer in select_layers if not -num_layers - 1 <= layer <= num_layers]
    if wrong or not select_layers:
        raise ValueError(
            f"select_layers={list(select_layers)}: this encoder has hidden states 0 (embeddings) "
            f"to {num_layers}, or -{num_layers + 1} to -1 from the end; choose at least one"
        )
    layers = tuple(sorted(layer % (num_layers + 1) for layer in select_layers))
    if len(set(layers)) != len(layers):
        raise ValueError(
            f"select_layers={list(select_layers)} names a hidden state twice (counted from the "
            f"start: {list(layers)}); name each once"
        )
    return layers


def _image_statistics(folder: Path, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return DEFAULT_STATISTICS[model_type]
    fields = json.loads(path.read_text())
    default_mean, default_std = DEFAULT_STATISTICS[model_type]
    if abs(fields.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ValueError(f"{path} has rescale_factor {fields['rescale_factor']}; expected 1/255")
    return (
        tuple(fields.get("image_mean", default_mean)),
        tuple(fields.get("image_std", default_std)),
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no table of the weights that a cut tower does not need."""
    log: Any = transformers_logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
