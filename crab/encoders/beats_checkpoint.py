"""BEATs weights on disk: Microsoft's public `.pt`, and a safetensors folder made from it.

The public file is a pickle {"cfg": dict, "model": state dict} (fine-tuned ones add a predictor and
a label list, which features do not need). It is read with torch's restricted unpickler only:
tensors and plain containers, no code. `convert_beats_checkpoint` makes a folder of it once; the
folder's digest is the same.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crab.encoders.beats import Beats, BeatsConfig
from crab.encoders.weights import require_safetensors

_SHARED_BIAS = ".self_attn.relative_attention_bias.weight"
_BIAS = "encoder.layers.0" + _SHARED_BIAS


def read_beats(path: Path) -> tuple[BeatsConfig, dict[str, Tensor]]:
    """Config and float32 weights from a `.pt` file or a safetensors folder.

    Raises ValueError for a file that is not a BEATs checkpoint or needs to run code to be read.
    """
    if path.is_dir():
        state = _read_safetensors(path)
        fields = json.loads((path / "config.json").read_text())
        kind = fields.pop("model_type", "nothing")
        if kind != "beats":
            raise ValueError(f"{path}/config.json has model_type {kind!r}; expected 'beats'")
        return BeatsConfig(**fields), _used_tensors(state)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle of more than tensors and plain values, so reading it would run "
            f"its code; expected Microsoft's layout {{'cfg', 'model'}} ({error})"
        ) from error
    except (EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as a torch checkpoint ({error}); it may be cut short: "
            "copy it again"
        ) from error
    if not isinstance(content, dict) or not {"cfg", "model"} <= content.keys():
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} holds {found}; a BEATs checkpoint holds 'cfg' and 'model'")
    return BeatsConfig.from_public(content["cfg"]), _used_tensors(content["model"])


def load_beats(path: Path) -> Beats:
    """The network with its weights, float32, on the CPU. ValueError if tensors do not fit."""
    config, state = read_beats(path)
    with torch.device("meta"):
        model = Beats(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if expected != given:
        wrong = sorted(
            name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)
        )
        shown = "; ".join(f"{n}: expected {expected.get(n)}, got {given.get(n)}" for n in wrong[:5])
        raise ValueError(
            f"{path}: {len(wrong)} tensors do not fit the network of its config: {shown}"
        )
    model.load_state_dict(state, assign=True)
    return model


def save_beats(model: Beats, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and model.safetensors; `dtype` is what the file holds, not the network."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in model.state_dict().items()
    }
    # config.json last: a folder without it is refused, so a killed save cannot pass for whole.
    partial = folder / f"model.safetensors.{os.getpid()}.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    fields = {"model_type": "beats", **model.config.model_dump()}
    partial = folder / f"config.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    partial.replace(folder / "config.json")


def convert_beats_checkpoint(source: Path, folder: Path) -> Path:
    """Turn Microsoft's `.pt` into a folder of safetensors and JSON. Returns the folder."""
    save_beats(load_beats(source), folder)
    return folder


def _used_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that features depend on: no predictor, the shared bias once, all in float32."""
    used: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("predictor"):
            continue
        if name.endswith(_SHARED_BIAS) and name != _BIAS:
            if _BIAS in state and not torch.equal(value, state[_BIAS]):
                raise ValueError(
                    f"{name} differs from {_BIAS}; in BEATs all layers share one table of position "
                    "biases, so this is not a BEATs checkpoint"
                )
            continue
        used[name] = value.float()
    return used


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from the shards that its index names."""
    require_safetensors(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{index} names {shard!r}; shards must lie in the same folder")
        tensors.update(load_file(folder / shard))
    return tensors
