"""Which files and which variables of the environment decide what an encoder gives.

The key of a feature holds no path and no file's digest, but the weights that were loaded and the settings that were
read. These are the files that they are read from: an audit holds everything that is opened against this list.
"""

from __future__ import annotations

import json
from pathlib import Path

from crab.encoders.config import EncoderConfig
from crab.encoders.weights import locate_weights

RESULT_VARIABLES = (
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKLDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_VML_MODE",
    "NVIDIA_TF32_OVERRIDE",
)
"""Native libraries read these by themselves and may then compute float32 with fewer bits, beyond rounding. No key
holds them, so they must not be set where features are made for others."""

READ_AS_TENSORS = "model.safetensors", "model.safetensors.index.json"
READ_AS_SETTINGS = "config.json", "preprocessor_config.json"
"""Settings that change numbers are in the record; tests/faults/test_key_metamorphic.py changes each one."""


def declared_files(config: EncoderConfig) -> list[Path]:
    """The files that an encoder is made of and that its record covers, those that are there.

    Raises ValueError where the weights are not found.
    """
    path = locate_weights(config)
    if path.is_file():
        return [path]
    names = [*READ_AS_TENSORS, *READ_AS_SETTINGS]
    index = path / "model.safetensors.index.json"
    if index.exists():
        names += sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path / name for name in names if (path / name).exists()]
