"""The tiny preset: the job that makes it, and the weights that are in the repository."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from crab.encoders.config import TINY_SELECT_LAYERS
from crab.encoders.frozen import VisionEncoder
from crab.encoders.load import load_encoder
from crab.encoders.tiny import build_random, tiny_clip_config
from crab.model.build import build_model
from crab.model.llm import load_llm, load_tokenizer
from crab.pretrain.fit import scenes
from crab.pretrain.vision import patches, train_vision
from crab.synth.evidence import targets
from crab.synth.make import make_scene
from crab.synth.render import render_frame
from crab.synth.sound import render_mono
from jobs import presets
from jobs import pretrain as job
from jobs.presets import TINY, crab_model_config, encoder_configs, tiny_folder
from jobs.spec import Encoders, Model, PretrainSpec, SpecError


def small(tmp_path: Path, **changes: int) -> PretrainSpec:
    values = {
        "clips": 10,
        "feature_clips": 2,
        "vision_steps": 2,
        "audio_steps": 1,
        "llm_steps": 2,
        "projector_steps": 2,
        "mask_steps": 1,
        "joint_steps": 1,
        "batch_size": 4,
    }
    return PretrainSpec(
        job="pretrain",
        name="small",
        out=str(tmp_path / "tiny"),
        runs=str(tmp_path / "runs"),
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        **(values | changes),
    )


def test_the_job_makes_a_preset_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = job.run(small(tmp_path))
    assert {"clip/loss", "beats/loss", "language/loss", "masks/mask", "joint/text"} <= set(
        result["metrics"]
    )
    monkeypatch.setattr(presets, "TINY", Path(result["out"]))
    for config in encoder_configs(Encoders()):
        load_encoder(config)
    words = load_tokenizer(str(tiny_folder("llm")))
    text = "<event> red circle </event> <range> 2,7 </range>"
    assert words.decode(words(text)["input_ids"]) == text
    assert load_llm(str(tiny_folder("llm"))).config.vocab_size == len(words)
    # First values of everything that is trained beside the adapter.
    model = build_model(crab_model_config(Model()), words)
    fresh = build_model(crab_model_config(Model(set={"initial": None})), words)
    other = dict(fresh.named_parameters())
    same = {
        name.split(".")[0]
        for name, value in model.named_parameters()
        if not name.startswith("llm") and value.numel() > 1 and torch.equal(value, other[name])
    }
    assert not same


def test_finished_stages_are_not_done_again(tmp_path: Path) -> None:
    spec = small(tmp_path)
    job.run(spec)
    stages = tmp_path / "tiny" / "stages"
    before = (stages / "clip" / "model.safetensors").stat().st_mtime_ns
    for name in ("stages/joint", "preset"):
        shutil.rmtree(tmp_path / "tiny" / name)
    # What a kill in the middle of a stage leaves.
    (stages / ".joint.tmp").mkdir()
    result = job.run(spec)
    assert (stages / "clip" / "model.safetensors").stat().st_mtime_ns == before
    assert "joint/loss" in result["metrics"]
    assert "clip/loss" not in result["metrics"]
    with pytest.raises(SpecError, match="llm_steps"):
        job.run(small(tmp_path, llm_steps=3))


def test_a_changed_byte_of_the_preset_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(TINY, copy)
    monkeypatch.setattr(presets, "TINY", copy)
    crab_model_config(Model())
    weights = copy / "llm" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SpecError, match=r"llm/model\.safetensors is not the file"):
        crab_model_config(Model())
    with pytest.raises(SpecError, match=r"llm/model\.safetensors is not the file"):
        encoder_configs(Encoders())
    shutil.copy(TINY / "llm" / "model.safetensors", weights)
    (copy / "initial" / "initial.safetensors").unlink()
    with pytest.raises(SpecError, match=r"initial\.safetensors is not the file"):
        crab_model_config(Model())


def test_training_lowers_the_loss_of_the_visual_encoder() -> None:
    model = build_random(tiny_clip_config(), 0)
    losses: list[float] = []
    train_vision(
        model,  # type: ignore[arg-type]  # build_random's answer follows its config
        scenes(0, 20),
        steps=30,
        batch=8,
        seed=0,
        on_step=lambda step, values: losses.append(values["loss"]),
    )
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_the_preset_in_the_repository_tells_classes_apart() -> None:
    """Held-out scenes: a linear map of its features names what a patch shows, another what a second sounds like."""
    video, audio = (load_encoder(config) for config in encoder_configs(Encoders()))
    assert isinstance(video, VisionEncoder)
    held_out = [make_scene(5, index) for index in range(40)]
    moments = [(scene, float(second)) for scene in held_out for second in (1, 4, 7)]
    features = video.encode(np.stack([render_frame(*moment, 112) for moment in moments]))
    side = math.isqrt(features[f"layer_{TINY_SELECT_LAYERS[-1]}"].shape[1])
    truth = patches(moments, side).classes.numpy()
    shown = truth > 0
    half = len(moments) // 2
    for layer, expected in ((TINY_SELECT_LAYERS[-1], 0.97), (TINY_SELECT_LAYERS[0], 0.5)):
        rows = features[f"layer_{layer}"]
        weights = _fit(rows[:half][shown[:half]], np.eye(13)[truth[:half][shown[:half]]])
        named = _apply(weights, rows[half:][shown[half:]]).argmax(1)
        assert (named == truth[half:][shown[half:]]).mean() > expected
    heard = np.concatenate([targets(scene)[1] for scene in held_out])
    waves = np.concatenate([render_mono(scene).reshape(10, -1) for scene in held_out])
    tokens = audio.encode(waves)["tokens"].mean(1)
    weights = _fit(tokens[:200], heard[:200])
    assert ((_apply(weights, tokens[200:]) > 0.5) == (heard[200:] > 0)).mean() > 0.95


def _fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge regression with an offset."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1).astype(np.float64)
    solved: np.ndarray = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
    return solved


def _apply(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    applied: np.ndarray = x @ weights[:-1] + weights[-1]
    return applied


def test_the_preset_is_small_and_is_what_its_digests_say() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 12 << 20
    assert presets.file_digests(TINY) == json.loads((TINY / presets.DIGESTS).read_text())
