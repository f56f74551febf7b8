"""Encoders through their Protocol: shapes, independence of neighbours, identity, refusals."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crab.encoders.base import Encoder
from crab.encoders.beats import BeatsConfig
from crab.encoders.config import TINY_SELECT_LAYERS
from crab.encoders.load import load_encoder
from crab.encoders.tiny import (
    build_random,
    save_encoder,
    tiny_beats_config,
    tiny_clip_config,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    save_encoder(build_random(tiny_clip_config(), seed=0), root / "clip")
    save_encoder(build_random(tiny_beats_config(), seed=0), root / "beats")
    return {"clip": root / "clip", "beats": root / "beats"}


def config(folder: Path, kind: str, **changes: Any) -> dict[str, Any]:
    layers = {"select_layers": list(TINY_SELECT_LAYERS)} if kind == "clip" else {}
    return {"kind": kind, "path": str(folder), "device": "cpu", **layers, **changes}


def items(kind: str, num: int, seed: int = 0, segment_ms: int = 1000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "clip":
        return rng.integers(0, 256, (num, 112, 112, 3), dtype=np.uint8)
    return rng.uniform(-0.5, 0.5, (num, segment_ms * 16)).astype(np.float32)


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_outputs_are_as_announced(folders: dict[str, Path], kind: str) -> None:
    encoder = load_encoder(config(folders[kind], kind, batch_size=4))
    assert isinstance(encoder, Encoder)
    features = encoder.encode(items(kind, 10))
    assert {key: value.shape for key, value in features.items()} == encoder.output_shapes(10)
    assert {value.dtype for value in features.values()} == {np.dtype(np.float32)}
    assert encoder.stream == {"clip": "video", "beats": "audio"}[kind]


@pytest.mark.parametrize(("segment_ms", "tokens"), [(1000, 48), (2000, 96)])
def test_tokens_of_a_segment(folders: dict[str, Path], segment_ms: int, tokens: int) -> None:
    encoder = load_encoder(config(folders["beats"], "beats"))
    features = encoder.encode(items("beats", 3, segment_ms=segment_ms))
    assert features["tokens"].shape == (3, tokens, 96)
    assert encoder.output_shapes(3, segment_ms=segment_ms) == {"tokens": (3, tokens, 96)}


def test_shortest_segment(folders: dict[str, Path]) -> None:
    encoder = load_encoder(config(folders["beats"], "beats"))
    shortest = encoder.min_segment_ms
    assert encoder.encode(items("beats", 1, segment_ms=shortest))["tokens"].shape == (1, 8, 96)
    with pytest.raises(ValueError, match="pad shorter segments"):
        encoder.encode(items("beats", 1, segment_ms=shortest - 1))


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_neighbours_do_not_matter(folders: dict[str, Path], kind: str) -> None:
    """Same place in a batch of the same shape: bit-equal. Alone or elsewhere: to rounding, since
    the matrix products of another shape add in another order."""
    encoder = load_encoder(config(folders[kind], kind))
    batch = items(kind, 6, seed=1)
    others = items(kind, 6, seed=2)
    others[2] = batch[2]
    together, replaced = encoder.encode(batch), encoder.encode(others)
    alone = encoder.encode(batch[2:3])
    for key in together:
        assert np.array_equal(together[key][2], replaced[key][2])
        # Measured 0.0 on one thread; other libraries may split a product by its shape.
        assert np.abs(together[key][2] - alone[key][0]).max() <= 2e-5


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_batch_size_and_place_are_not_identity(folders: dict[str, Path], kind: str) -> None:
    one = load_encoder(config(folders[kind], kind, batch_size=1))
    many = load_encoder(config(folders[kind], kind, batch_size=64))
    assert one.record() == many.record()
    batch = items(kind, 5)
    for key, value in one.encode(batch).items():
        assert np.abs(value - many.encode(batch)[key]).max() <= 2e-5


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_record_is_plain_and_free_of_places(folders: dict[str, Path], kind: str) -> None:
    record = load_encoder(config(folders[kind], kind)).record()
    leaves = [leaf for v in record.values() for leaf in (v if isinstance(v, list) else [v])]
    assert all(type(leaf) in (str, int) for leaf in leaves)
    text = json.dumps(record)
    assert str(folders[kind]) not in text
    assert "cpu" not in text


def test_settings_outside_the_weights_are_identity(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same tensors with another epsilon or distance compute something else."""
    for kind, key, value in (("clip", "layer_norm_eps", 1e-3), ("beats", "max_distance", 90)):
        changed = tmp_path / kind
        changed.mkdir()
        for source in folders[kind].iterdir():
            (changed / source.name).write_bytes(source.read_bytes())
        fields = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps({**fields, key: value}))
        before = load_encoder(config(folders[kind], kind))
        after = load_encoder(config(changed, kind))
        assert before.weights_sha256 == after.weights_sha256
        assert before.record() != after.record()


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_saved_weights_come_back(tmp_path: Path, kind: str) -> None:
    preset = tiny_clip_config() if kind == "clip" else tiny_beats_config()
    module = build_random(preset, seed=3).eval()
    save_encoder(module, tmp_path)
    batch = items(kind, 2)
    with torch.inference_mode():
        made = module(torch.from_numpy(batch))
    made = made if kind == "clip" else {"tokens": made}
    for key, value in load_encoder(config(tmp_path, kind)).encode(batch).items():
        assert np.array_equal(value, made[key].numpy())


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_random_weights_follow_the_seed_and_leave_the_caller_alone(kind: str) -> None:
    preset = tiny_clip_config() if kind == "clip" else tiny_beats_config()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, same, other = (build_random(preset, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_every_weight_that_features_use_can_be_trained(folders: dict[str, Path], kind: str) -> None:
    # Encode first: tables cached under inference mode must not break a later backward.
    load_encoder(config(folders[kind], kind)).encode(items(kind, 1))
    preset = tiny_clip_config() if kind == "clip" else tiny_beats_config()
    module = build_random(preset, seed=0).train()
    out = module(torch.from_numpy(items(kind, 2)))
    loss = sum(
        (v**2 * torch.randn_like(v)).sum() for v in (out.values() if kind == "clip" else [out])
    )
    loss.backward()
    idle = [
        name
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert all("post_layernorm" in name for name in idle)


@pytest.mark.parametrize("layers", [[2, 5], [-6], [99]])
def test_layers_out_of_range_name_the_range(folders: dict[str, Path], layers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"0 \(embeddings\) to 4"):
        load_encoder(config(folders["clip"], "clip", select_layers=layers))


def test_layers_may_be_counted_from_the_end(folders: dict[str, Path]) -> None:
    backward = load_encoder(config(folders["clip"], "clip", select_layers=[-1, -3]))
    forward = load_encoder(config(folders["clip"], "clip", select_layers=[2, 4]))
    assert backward.record() == forward.record()
    with pytest.raises(ValueError, match="twice"):
        load_encoder(config(folders["clip"], "clip", select_layers=[4, -1]))


def test_pickled_clip_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders["clip"] / "config.json").read_bytes())
    torch.save({"weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load_encoder(config(tmp_path, "clip"))


class _Touch:
    """What a hostile checkpoint does: creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_beats_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    torch.save({"cfg": {}, "model": {"x": _Touch(trap)}}, tmp_path / "beats.pt")
    with pytest.raises(ValueError, match="run its code"):
        load_encoder(config(tmp_path / "beats.pt", "beats"))
    assert not trap.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"cfg": _Touch(trap)}, protocol=2))
    with pytest.raises(ValueError, match="run its code"):
        load_encoder(config(tmp_path / "plain.pt", "beats"))
    assert not trap.exists()


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"cfg": {}, "model": {"x": torch.ones(1000)}}, tmp_path / "beats.pt")
    whole = (tmp_path / "beats.pt").read_bytes()
    (tmp_path / "beats.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="copy it again"):
        load_encoder(config(tmp_path / "beats.pt", "beats"))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precision_of_the_process_is_left_alone(folders: dict[str, Path], precision: str) -> None:
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        load_encoder(config(folders["beats"], "beats")).encode(items("beats", 1))
        assert setting.fp32_precision == precision
    finally:
        setting.fp32_precision = before


def test_incomplete_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers would go on with random numbers, and only warn."""
    from safetensors.torch import load_file, save_file

    for kind, match in (("clip", "lacks 1 weights"), ("beats", "1 tensors do not fit")):
        broken = tmp_path / kind
        broken.mkdir()
        (broken / "config.json").write_bytes((folders[kind] / "config.json").read_bytes())
        tensors = load_file(folders[kind] / "model.safetensors")
        del tensors[
            next(n for n in sorted(tensors) if n.endswith("layers.0.self_attn.k_proj.bias"))
        ]
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=match):
            load_encoder(config(broken, kind))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"path": ""}, "exactly one"),
        ({"hub_id": "openai/clip-vit-large-patch14"}, "exactly one"),
        ({"path": "/nowhere/at/all"}, "does not exist"),
        ({"select_layers": []}, "select_layers is empty"),
        ({"layers": [1]}, "layers"),
        ({"dtype": "float8"}, "float32"),
        ({"kind": "beats"}, "remove the field"),
    ],
)
def test_wrong_configs_are_refused(
    folders: dict[str, Path], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        load_encoder({**config(folders["clip"], "clip"), **changes})


def test_wrong_input_is_refused(folders: dict[str, Path]) -> None:
    clip = load_encoder(config(folders["clip"], "clip"))
    beats = load_encoder(config(folders["beats"], "beats"))
    with pytest.raises(ValueError, match="expected uint8"):
        clip.encode(items("clip", 1).astype(np.float32))
    with pytest.raises(ValueError, match="112, 112, 3"):
        clip.encode(np.zeros((1, 224, 224, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="expected float32"):
        beats.encode(np.zeros((1, 16_000), dtype=np.int16))
    with pytest.raises(ValueError, match="empty batch"):
        clip.encode(items("clip", 0))


def test_results_that_are_not_finite_never_leave(folders: dict[str, Path]) -> None:
    beats = load_encoder(config(folders["beats"], "beats"))
    batch = items("beats", 2)
    batch[1, 5] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        beats.encode(batch)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"encoder_embed_dim": 100, "encoder_attention_heads": 12}, "encoder_attention_heads=12"),
        ({"conv_pos_groups": 7}, "conv_pos_groups=7"),
        ({"input_patch_size": 12}, "input_patch_size=12"),
    ],
)
def test_impossible_networks_are_refused(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        BeatsConfig(**fields)


def test_variants_that_were_never_published_are_refused() -> None:
    with pytest.raises(ValueError, match="layer_norm_first=True"):
        BeatsConfig.from_public({"layer_norm_first": True})


def test_loading_a_folder_opens_no_connection(folders: dict[str, Path]) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('a connection was tried')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from crab.encoders.load import load_encoder\n"
        f"load_encoder({config(folders['clip'], 'clip')!r})\n"
        f"load_encoder({config(folders['beats'], 'beats')!r})\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
