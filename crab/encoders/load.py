"""The way in: a config becomes an encoder on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crab.encoders.beats_checkpoint import load_beats
from crab.encoders.clip import load_vision
from crab.encoders.config import EncoderConfig
from crab.encoders.frozen import AudioEncoder, VisionEncoder
from crab.encoders.weights import locate_weights


def load_encoder(config: EncoderConfig | Mapping[str, Any]) -> VisionEncoder | AudioEncoder:
    """The encoder that `config` describes, on its device, frozen. See `EncoderConfig`.

    Raises ValueError (pydantic's for unknown or contradictory fields) for weights that are absent,
    pickled, incomplete or of another kind, and for layers that the network does not have.
    """
    if not isinstance(config, EncoderConfig):
        config = EncoderConfig.model_validate(dict(config))
    path = locate_weights(config)
    if config.kind == "beats":
        return AudioEncoder(load_beats(path), config)
    return VisionEncoder(load_vision(path, config.select_layers), config)
