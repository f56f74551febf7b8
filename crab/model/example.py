"""One sample with its cached features, as it goes into a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from crab.samples import Sample

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A sample with its features: stream name -> layer name -> array [frames or segments, P, D]."""

    sample: Sample
    features: Mapping[str, Mapping[str, np.ndarray]]


def checked_layer(
    example: Example, stream: str, layer: str, feature_size: int, setting: str
) -> np.ndarray:
    """One layer of a stream, [frames or segments, P, D]. `setting` is the config's field that names the layer.

    Raises:
        ValueError: the layer is absent or its shape is wrong; names the sample.
    """
    layers, sample_id = example.features[stream], example.sample.id
    if layer not in layers:
        raise ValueError(
            f"sample {sample_id!r}: {stream} features have layers {sorted(layers)}, the model "
            f"reads {layer!r}; preprocess with that layer or change {setting}"
        )
    array = layers[layer]
    if array.ndim != 3 or array.shape[2] != feature_size or 0 in array.shape:
        raise ValueError(
            f"sample {sample_id!r}: {stream} features {layer!r} have shape {array.shape}, expected "
            f"[frames or segments, encoder tokens, {feature_size}], none of them 0"
        )
    return array
