"""The tiny preset: the job that makes it, and the weights that are in the repository."""

from pathlib import Path

import numpy as np
import torch

from crab import pretrain
from crab.encoders import VisionEncoder, load_encoder
from crab.encoders.tiny import build_random, tiny_clip_config
from crab.model.llm import load_llm, load_tokenizer
from crab.synth.evidence import targets
from crab.synth.make import make_scene
from crab.synth.render import render_frame
from crab.synth.sound import render_mono
from jobs import pretrain as job
from jobs.presets import TINY, encoder_configs
from jobs.spec import Encoders, PretrainSpec


def test_the_job_makes_folders_that_load(tmp_path: Path) -> None:
    spec = PretrainSpec(
        job="pretrain",
        name="small",
        out=str(tmp_path / "tiny"),
        runs=str(tmp_path / "runs"),
        tracking={"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        clips=10,
        vision_steps=2,
        audio_steps=1,
        llm_steps=2,
        batch_size=2,
    )
    result = job.run(spec)
    assert {"clip/loss", "beats/loss", "llm/loss"} <= set(result["metrics"])
    out = tmp_path / "tiny"
    for kind, folder, layers in (("clip", "clip", (4,)), ("beats", "beats", ())):
        load_encoder({"kind": kind, "path": str(out / folder), "select_layers": layers})
    words = load_tokenizer(str(out / "llm"))
    text = "<event> red circle </event> <range> 2,7 </range>"
    assert words.decode(words(text)["input_ids"]) == text
    assert load_llm(str(out / "llm")).config.vocab_size == len(words)


def test_training_lowers_the_loss_of_the_visual_encoder() -> None:
    model = build_random(tiny_clip_config(), 0)
    losses: list[float] = []
    pretrain.train_vision(
        model,  # type: ignore[arg-type]  # build_random's answer follows its config
        pretrain.scenes(0, 20),
        steps=30,
        batch=16,
        seed=0,
        on_step=lambda step, values: losses.append(values["loss"]),
    )
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_the_preset_in_the_repository_tells_classes_apart() -> None:
    """Held-out scenes: the nearest neighbour by mean feature has the same single shape in view far above chance."""
    video, audio = (load_encoder(config) for config in encoder_configs(Encoders()))
    assert isinstance(video, VisionEncoder)
    scenes = [make_scene(5, index) for index in range(40)]
    frames = np.stack([render_frame(s, t, 112) for s in scenes for t in range(10)])
    seen = np.concatenate([targets(s)[0] for s in scenes])
    heard = np.concatenate([targets(s)[1] for s in scenes])
    waves = np.concatenate([render_mono(s).reshape(10, -1) for s in scenes])
    for features, labels in (
        (video.encode(frames)["layer_4"].max(1), seen),
        (audio.encode(waves)["tokens"].mean(1), heard),
    ):
        assert _probe(features, labels) > 0.9


def _probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of a ridge regression on half of the seconds, tested on the other half (different scenes)."""
    half = len(features) // 2
    x = torch.tensor(features).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    y = torch.tensor(labels).double()
    a, b = x[:half], y[:half]
    weights = torch.linalg.solve(
        a.T @ a + 0.1 * torch.eye(a.shape[1], dtype=torch.float64), a.T @ b
    )
    return float((((x[half:] @ weights) > 0.5) == (y[half:] > 0.5)).double().mean())


def test_the_preset_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 12 << 20
