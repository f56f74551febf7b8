"""Kaldi's log-mel filter bank, batched in torch: the front end of BEATs.

Same definition as Kaldi's compute-fbank-feats (https://kaldi-asr.org/doc/feat.html) with the
settings BEATs was trained with: 25 ms frames every 10 ms, only frames that fit whole, no dither,
mean removed per frame, pre-emphasis 0.97, Povey window, 512-point power spectrum, 128 triangles
between 20 Hz and 8 kHz, natural log with a floor of the float32 epsilon. torchaudio has it too, but
for one waveform at a time, and its wheels need a CUDA build of torch.

Names: N segments, T samples, F frames, W samples of a frame, M mel bins.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 400
SHIFT_SAMPLES = 160
FFT_SAMPLES = 512
NUM_MEL_BINS = 128
LOW_FREQUENCY_HZ = 20.0
PREEMPHASIS = 0.97
INT16_SCALE = 2**15
"""Kaldi counts amplitudes as 16-bit integers; ours are in [-1, 1]."""


def num_frames(num_samples: int) -> int:
    """Frames of a waveform; a remainder shorter than a frame is dropped."""
    return max(0, 1 + (num_samples - FRAME_SAMPLES) // SHIFT_SAMPLES)


def log_mel(waveform_NT: Tensor) -> Tensor:
    """Log-mel energies [N, F, 128], float32, of mono 16 kHz waveforms [N, T] in [-1, 1].

    Always float32, whatever the encoder computes in: power spectra of 16-bit amplitudes span more
    than half precision can hold. Raises ValueError for waveforms shorter than one frame (400).
    """
    if waveform_NT.ndim != 2 or waveform_NT.shape[1] < FRAME_SAMPLES:
        raise ValueError(
            f"got a waveform of shape {tuple(waveform_NT.shape)}; expected [segments, samples] "
            f"with at least {FRAME_SAMPLES} samples (25 ms at 16 kHz); pad with zeros"
        )
    window_W, mel_KM = _tables(waveform_NT.device)
    scaled = waveform_NT.float() * INT16_SCALE
    frames_NFW = scaled.unfold(-1, FRAME_SAMPLES, SHIFT_SAMPLES)
    frames_NFW = frames_NFW - frames_NFW.mean(-1, keepdim=True)
    # What precedes the first sample does not matter: the window is zero there.
    previous = F.pad(frames_NFW[..., :-1], (1, 0))
    frames_NFW = (frames_NFW - PREEMPHASIS * previous) * window_W
    power_NFK = torch.fft.rfft(frames_NFW, n=FFT_SAMPLES).abs().square()
    energy_NFM = power_NFK @ mel_KM
    floored: Tensor = energy_NFM.clamp_min(torch.finfo(torch.float32).eps)
    return floored.log()


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    # A tensor made under inference_mode can never take part in training; these are shared by both.
    with torch.inference_mode(False):
        hann = torch.hann_window(FRAME_SAMPLES, periodic=False)
        return hann.pow(0.85).to(device), _mel_triangles().to(device)


def _mel(frequency_hz: float) -> float:
    return 1127.0 * math.log(1.0 + frequency_hz / 700.0)


def _mel_triangles() -> Tensor:
    """Weights [257, 128]: triangles of equal width on the mel axis, overlapping by half.

    In float32 on purpose: the lowest triangles are narrower than a bin of the spectrum, so some see
    one bin at the very foot of a slope, and the networks were trained on float32's value of it.
    """
    low, high = _mel(LOW_FREQUENCY_HZ), _mel(SAMPLE_RATE_HZ / 2)
    step = (high - low) / (NUM_MEL_BINS + 1)
    index = torch.arange(NUM_MEL_BINS)
    left, centre, right = (low + (index + shift) * step for shift in (0.0, 1.0, 2.0))
    bin_hz = torch.arange(FFT_SAMPLES // 2) * (SAMPLE_RATE_HZ / FFT_SAMPLES)
    mel = (1127.0 * (1.0 + bin_hz / 700.0).log())[:, None]
    rising = (mel - left) / (centre - left)
    falling = (right - mel) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    # Kaldi gives the bin at the Nyquist frequency no weight.
    return F.pad(triangles, (0, 0, 0, 1))
