"""Which encoder, and how to run it. Imports no torch: a spec is read, and a warm job runs, without it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

TINY_SELECT_LAYERS = (2, 4)
"""Of the tiny preset, as [14, 22, 23] of ViT-L/14: both for masks, the last also for the language model."""


class EncoderConfig(BaseModel):
    """Which weights, which layers, and how to run them. Exactly one of `path` and `hub_id`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["clip", "beats"]
    """"clip" is any CLIP or SigLIP checkpoint (images), "beats" any BEATs checkpoint (audio)."""
    path: str = ""
    """Folder with config.json and safetensors; for BEATs also a public `.pt` file."""
    hub_id: str = ""
    """Hugging Face repository. The only field that may lead to a download."""
    revision: str = "main"
    select_layers: tuple[int, ...] = ()
    """Indices into Hugging Face's `hidden_states` (0 = embeddings); clip only."""
    device: str = "auto"
    """A torch device, or "auto": CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = Field(default=32, ge=1)
    """Items in one forward pass; bounds memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.path) == bool(self.hub_id):
            raise ValueError(
                f"got path={self.path!r} and hub_id={self.hub_id!r}; give exactly one: path for a "
                "local folder, hub_id for a repository that may be downloaded"
            )
        if self.kind == "clip" and not self.select_layers:
            raise ValueError(
                "select_layers is empty; name the hidden states to keep, e.g. [14, 22, 23] for "
                "ViT-L/14"
            )
        if self.kind == "beats" and self.select_layers:
            raise ValueError(
                f"select_layers={list(self.select_layers)} was given for a BEATs encoder, which "
                "returns its last layer only; remove the field"
            )
        return self
