"""Laws of the weights' digest: it follows the numbers, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from crab.encoders.digest import weights_digest
from crab.encoders.load import load_encoder
from crab.encoders.tiny import build_random, save_encoder, tiny_beats_config, tiny_clip_config


def test_golden_digest() -> None:
    """Changing this digest makes every cached feature of every team a miss."""
    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    assert weights_digest(tensors) == (
        "a29cf94dc1a4dd7032f9dcc82b096edece1467128d6544f672defc534f893b40"
    )


def test_order_strides_and_sharing_do_not_matter() -> None:
    a, b = torch.randn(4, 3), torch.randn(5)
    digest = weights_digest({"a": a, "b": b})
    assert weights_digest({"b": b.clone(), "a": a.t().contiguous().t()}) == digest


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 11), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_it(index: int, bit: int) -> None:
    weights = torch.arange(12, dtype=torch.float32)
    changed = weights.clone()
    changed.view(torch.int32)[index] ^= -(2**31) if bit == 31 else 1 << bit
    assert weights_digest({"w": changed}) != weights_digest({"w": weights})


def test_name_dtype_and_shape_count() -> None:
    weights = torch.zeros(2, 6)
    variants = [
        {"w": weights},
        {"v": weights},
        {"w": weights.reshape(3, 4)},
        {"w": weights.to(torch.int32)},
        {"w": weights, "v": torch.zeros(0)},
        {"w": weights[:1], "x": weights[1:]},
    ]
    assert len({weights_digest(variant) for variant in variants}) == len(variants)


def test_names_cannot_be_forged_into_one_another() -> None:
    one = torch.zeros(1)
    inner = weights_digest({"a": one})
    assert weights_digest({"a' float32 [1] x\n'b": one}) != weights_digest({"a": one, "b": one})
    assert inner != weights_digest({"a\n": one})


def test_nothing_has_no_digest() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weights_digest({})


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_shards_paths_and_unused_tensors_do_not_matter(tmp_path: Path, kind: str) -> None:
    preset = tiny_clip_config() if kind == "clip" else tiny_beats_config()
    whole, sharded = tmp_path / "whole", tmp_path / "elsewhere" / "sharded"
    save_encoder(build_random(preset, seed=0), whole)
    sharded.mkdir(parents=True)
    tensors = load_file(whole / "model.safetensors")
    tensors["predictor.weight" if kind == "beats" else "visual_projection.weight"] = torch.ones(3)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, sharded / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded / "config.json").write_bytes((whole / "config.json").read_bytes())

    layers = {"select_layers": [2, 3]} if kind == "clip" else {}
    digests = {
        load_encoder({"kind": kind, "path": str(p), "device": "cpu", **layers}).weights_sha256
        for p in (whole, sharded)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_one_changed_weight_is_another_encoder(tmp_path: Path, kind: str) -> None:
    preset = tiny_clip_config() if kind == "clip" else tiny_beats_config()
    save_encoder(build_random(preset, seed=0), tmp_path)
    layers = {"select_layers": [2, 3]} if kind == "clip" else {}
    config = {"kind": kind, "path": str(tmp_path), "device": "cpu", **layers}
    before = load_encoder(config).weights_sha256
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(
        n for n in sorted(tensors) if n.endswith("layers.1.fc1.weight") or "1.mlp.fc1.w" in n
    )
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_encoder(config).weights_sha256 != before


def test_layers_that_are_not_run_do_not_count(tmp_path: Path) -> None:
    """The weights of layer 4 have no part in hidden states 2 and 3."""
    save_encoder(build_random(tiny_clip_config(), seed=0), tmp_path)
    config = {"kind": "clip", "path": str(tmp_path), "select_layers": [2, 3], "device": "cpu"}
    before = load_encoder(config).weights_sha256
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        if ".layers.3." in name or "post_layernorm" in name:
            tensors[name] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_encoder(config).weights_sha256 == before
    assert load_encoder({**config, "select_layers": [2, 4]}).weights_sha256 != before
