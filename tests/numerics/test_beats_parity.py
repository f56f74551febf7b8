"""BEATs and its filter bank against other people's code, at random weights in the public layout.

Oracles: torchaudio's Kaldi filter bank and `openbeats` (Microsoft's network as ESPnet keeps it).
Neither can be a dependency of the default environment: openbeats imports torchaudio, whose wheels
do not load beside a CPU build of torch. So what both returned for a small network is kept beside
this file (`beats_oracle.safetensors`: weights, audio, filter bank, tokens) and always checked;
where openbeats is installed (`pip install --no-deps openbeats`), it also runs at the real widths.
The kept file was written by `python tests/numerics/test_beats_parity.py`, with openbeats 0.1.1 and
torchaudio 2.11.0.

Tolerances are stated with the worst case measured on CPU in float32, torch 2.13.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crab.encoders.beats import FBANK_MEAN, FBANK_STD, Beats, BeatsConfig
from crab.encoders.beats_checkpoint import convert_beats_checkpoint, load_beats
from crab.encoders.fbank import log_mel
from crab.encoders.load import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TRAINING_ONLY = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "layer_wise_gradient_decay_ratio": 0.6,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}


def public_cfg(**changes: Any) -> dict[str, Any]:
    """The "cfg" of BEATs_iter3+ (AS2M), with fewer layers unless told otherwise."""
    return {
        "encoder_layers": 3,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "input_patch_size": 16,
        "embed_dim": 512,
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "num_buckets": 320,
        "max_distance": 800,
        "deep_norm": True,
        "finetuned_model": False,
        **TRAINING_ONLY,
        **changes,
    }


KEPT = Path(__file__).with_name("beats_oracle.safetensors")
SMALL_CFG = public_cfg(
    encoder_layers=2,
    encoder_embed_dim=24,
    encoder_ffn_embed_dim=48,
    encoder_attention_heads=3,
    embed_dim=16,
    conv_pos=16,
    conv_pos_groups=4,
    num_buckets=32,
    max_distance=100,
)
"""Distances from 8 tokens on share buckets, so one second covers both rules."""


@pytest.fixture(scope="module")
def openbeats() -> Iterator[Any]:
    """openbeats' encoder module. torchaudio, which it wants for the filter bank only, is stood in
    for by the plain reference below while it is imported."""
    pytest.importorskip("openbeats", reason="oracle; pip install --no-deps openbeats")
    names = ("torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi")
    kept = {name: sys.modules.pop(name, None) for name in names}
    package, compliance, kaldi = (types.ModuleType(name) for name in names)
    vars(kaldi)["fbank"] = lambda waveform, **_: torch.from_numpy(
        reference_filter_bank(waveform[0].numpy())
    ).float()
    vars(compliance)["kaldi"] = kaldi
    vars(package)["compliance"] = compliance
    sys.modules.update(zip(names, (package, compliance, kaldi), strict=True))
    try:
        yield importlib.import_module("openbeats.beats_encoder")
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def reference_filter_bank(waveform: np.ndarray) -> np.ndarray:
    """Kaldi's log-mel [F, 128] of samples at 16-bit scale: one frame and one triangle at a time, in
    double precision except for the corners of the triangles."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    single = np.float32
    low, high = (1127 * np.log(1 + hz / 700) for hz in (20.0, 8000.0))
    step = (high - low) / 129
    mel = single(1127) * np.log(single(1) + np.arange(257, dtype=single) * single(31.25 / 700))
    rows = []
    for start in range(0, len(waveform) - 399, 160):
        frame = waveform[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        emphasised = np.array([frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(400)])
        power = np.abs(np.fft.rfft(emphasised * window, 512)) ** 2
        energies = []
        for index in range(128):
            left, centre, right = (low + (index + shift) * step for shift in (0, 1, 2))
            weight = np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
            energies.append(np.maximum(weight, 0)[:256] @ power[:256])
        rows.append(np.log(np.maximum(energies, np.finfo(np.float32).eps)))
    return np.array(rows)


def oracle_with_random_weights(openbeats: Any, cfg: dict[str, Any], seed: int) -> Any:
    """Weights large enough that gates, biases and convolution all matter to the output."""
    oracle = openbeats.BeatsEncoder(input_size=0, beats_config=cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("_pad.weight"):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm.weight", "weight_g", "grep_a")):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias.weight"):
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return oracle


def public_checkpoint(oracle: Any, cfg: dict[str, Any], path: Path) -> Path:
    """A file as Microsoft publishes it; the fine-tuned ones have a predictor and labels too."""
    model = {k: v for k, v in oracle.state_dict().items() if not k.endswith("_pad.weight")}
    content: dict[str, Any] = {"cfg": cfg, "model": model}
    if cfg["finetuned_model"]:
        model["predictor.weight"] = torch.randn(527, cfg["encoder_embed_dim"])
        model["predictor.bias"] = torch.randn(527)
        content["label_dict"] = {index: f"/m/{index}" for index in range(527)}
    torch.save(content, path)
    return path


def waveforms(num: int, samples: int, seed: int = 0) -> Tensor:
    """A tone, noise, a quiet tail and silence: what segments hold."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    rows = [
        0.4 * np.sin(2 * np.pi * (220 + 130 * row) * time) + 0.05 * rng.standard_normal(samples)
        for row in range(num)
    ]
    rows[0][samples // 2 :] *= 1e-3
    rows[-1][:] = 0
    return torch.from_numpy(np.stack(rows).astype(np.float32))


def agrees(ours: torch.Tensor, kept: torch.Tensor) -> bool:
    """Within 1e-4 in each log energy, as long as float32 can tell: an FFT rounds amplitudes by about epsilon of the
    loudest, so the energy of a bin is known to 2 epsilon over the root of its share of the loudest one of its frame."""
    share = (kept - kept.amax(-1, keepdim=True)).exp()
    rounding = 2 * torch.finfo(torch.float32).eps / share.sqrt()
    return bool(((ours - kept).abs() <= rounding.clamp(min=1e-4)).all())


def test_filter_bank_equals_torchaudio_as_kept() -> None:
    kept = load_file(KEPT)
    ours = log_mel(kept["audio"])
    assert ours.shape == (2, 98, 128)
    # Measured: bit-equal on the CPU that it was kept on (EPYC). On another (Xeon) one bin of 25,088 is 2.3e-4 off:
    # it has 2e-7 of its frame's loudest energy (rounding: 5.2e-4), the next 7.2e-5.
    assert agrees(ours, kept["fbank"])
    assert (ours - kept["fbank"]).abs().mean() <= 1e-5
    assert not agrees(kept["fbank"] + 1.5e-4, kept["fbank"])


@pytest.mark.parametrize("samples", [400, 2800, 16_123])
def test_filter_bank_equals_plain_reference(samples: int) -> None:
    audio = waveforms(3, samples)
    theirs = np.stack([reference_filter_bank(row.numpy() * 2.0**15) for row in audio])
    ours = log_mel(audio).numpy()
    assert ours.shape == theirs.shape
    # Measured 6.5e-4 at a log energy of 6 (float32's rounding of a quiet bin beside a loud one).
    assert np.abs(ours - theirs).max() <= 2e-3


def test_tokens_equal_openbeats_as_kept(tmp_path: Path) -> None:
    kept = load_file(KEPT)
    kept_checkpoint(tmp_path / "beats.pt")
    encoder = load_encoder({"kind": "beats", "path": str(tmp_path / "beats.pt"), "device": "cpu"})
    ours = encoder.encode(kept["audio"].numpy())["tokens"]
    assert ours.shape == (2, 48, 24)
    # Measured 9.5e-7. Values have a standard deviation of about 1.
    assert np.abs(ours - kept["tokens"].numpy()).max() <= 5e-5


@pytest.mark.parametrize(
    ("cfg", "samples"),
    [
        (public_cfg(), 16_000),
        (public_cfg(encoder_layers=2, finetuned_model=True, predictor_class=527), 32_000),
        # Long enough for distances that share a bucket by logarithm (80 and more).
        (public_cfg(encoder_layers=2), 64_000),
        (public_cfg(encoder_layers=1, deep_norm=False, conv_bias=True, embed_dim=768), 16_000),
    ],
    ids=["pretrained-1s", "fine-tuned-2s", "far-buckets-4s", "no-deep-norm"],
)
def test_tokens_equal_the_oracle(
    openbeats: Any, tmp_path: Path, cfg: dict[str, Any], samples: int
) -> None:
    oracle = oracle_with_random_weights(openbeats, cfg, seed=1)
    path = public_checkpoint(oracle, cfg, tmp_path / "beats.pt")
    audio = waveforms(3, samples)
    with torch.inference_mode():
        theirs = oracle.extract_features(audio)[0]
    encoder = load_encoder({"kind": "beats", "path": str(path), "device": "cpu"})
    ours = encoder.encode(audio.numpy())["tokens"]
    assert ours.shape == tuple(theirs.shape)
    worst = np.abs(ours - theirs.numpy()).max()
    # Measured 8.2e-5, nearly all of it the reference filter bank's double precision: with
    # torchaudio's own filter bank it was 4.8e-6 over 12 layers (standard deviation of values: 1).
    assert worst <= 4e-4


def test_network_alone_equals_the_oracle_in_double_precision(openbeats: Any) -> None:
    """With rounding out of the way only a wrong formula can differ."""
    cfg = public_cfg(encoder_layers=2)
    oracle = oracle_with_random_weights(openbeats, cfg, seed=2).double()
    ours = Beats(BeatsConfig.from_public(cfg)).double().eval()
    ours.load_state_dict(
        {k: v for k, v in oracle.state_dict().items() if k in ours.state_dict()}, strict=True
    )
    fbank = (log_mel(waveforms(2, 32_000)) - FBANK_MEAN) / (2 * FBANK_STD)
    image = fbank.double()[:, None]
    with torch.inference_mode():
        patches = oracle.patch_embedding(image).flatten(2).transpose(1, 2)
        theirs = oracle.encoder(oracle.post_extract_proj(oracle.layer_norm(patches)))[0]
        mine = ours.encoder(ours.post_extract_proj(ours.layer_norm(patches)))
    # Measured 8.0e-15.
    assert (mine - theirs).abs().max() <= 1e-12


def kept_checkpoint(path: Path, **cfg: Any) -> dict[str, Any]:
    """The kept weights as a public `.pt` file at `path`; returns its content."""
    kept = load_file(KEPT)
    weights = {k.removeprefix("model."): v for k, v in kept.items() if k.startswith("model.")}
    content: dict[str, Any] = {"cfg": {**SMALL_CFG, **cfg}, "model": weights}
    torch.save(content, path)
    return content


def test_converted_and_fine_tuned_checkpoints_are_the_same_network(tmp_path: Path) -> None:
    content = kept_checkpoint(tmp_path / "beats.pt")
    content["cfg"] |= {"finetuned_model": True, "predictor_class": 527}
    content["model"] |= {"predictor.weight": torch.ones(527, 24), "predictor.bias": torch.ones(527)}
    content["label_dict"] = {index: f"/m/{index}" for index in range(527)}
    torch.save(content, tmp_path / "fine-tuned.pt")
    convert_beats_checkpoint(tmp_path / "fine-tuned.pt", tmp_path / "converted")
    audio = waveforms(2, 16_000).numpy()
    plain, *others = (
        load_encoder({"kind": "beats", "path": str(tmp_path / name), "device": "cpu"})
        for name in ("beats.pt", "fine-tuned.pt", "converted")
    )
    for other in others:
        assert other.record() == plain.record()
        assert np.array_equal(other.encode(audio)["tokens"], plain.encode(audio)["tokens"])


def test_layers_with_their_own_position_bias_are_refused(tmp_path: Path) -> None:
    content = kept_checkpoint(tmp_path / "beats.pt")
    content["model"]["encoder.layers.1.self_attn.relative_attention_bias.weight"] += 1
    torch.save(content, tmp_path / "beats.pt")
    with pytest.raises(ValueError, match="share one table"):
        load_beats(tmp_path / "beats.pt")


def write_kept_outputs() -> None:
    """Ask torchaudio and openbeats themselves (both installed for real) for `KEPT`."""
    kaldi = importlib.import_module("torchaudio.compliance.kaldi")
    encoder_module = importlib.import_module("openbeats.beats_encoder")
    oracle = oracle_with_random_weights(encoder_module, SMALL_CFG, seed=7)
    audio = waveforms(2, 16_000)
    settings = {"num_mel_bins": 128, "sample_frequency": 16_000}
    with torch.inference_mode():
        content = {
            "audio": audio,
            "fbank": torch.stack([kaldi.fbank(row[None] * 2**15, **settings) for row in audio]),
            "tokens": oracle.extract_features(audio)[0].contiguous(),
        }
    for name, value in oracle.state_dict().items():
        if not name.endswith("_pad.weight"):
            content[f"model.{name}"] = value.clone().contiguous()
    save_file(content, KEPT)


if __name__ == "__main__":
    write_kept_outputs()
