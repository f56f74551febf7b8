"""Sound of a scene: every class has its own timbre, told apart within one second by pitch, spectrum and movement.

Pitch rises by colour in steps of 1.6 and by shape in steps of 1.17, so the twelve fundamentals (300 Hz to 1.7 kHz) are
at least 17 % apart: several mel bins of the encoder's 128. The shape sets the spectrum and its movement: a circle hums
with a vibrato, a square buzzes in odd harmonics, a triangle is plucked five times a second with some noise, which 16 x
16 fbank patches (160 ms) can see. Sounding seconds begin and end in 40 ms of silence and ramp, which keeps AAC's
priming and its window (at most 2048 samples) from carrying sound into a silent second.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab.synth.scene import COLOURS, SHAPES, Actor, Scene
from crab.tasks.spans import runs

LOWEST_HZ = 300.0
COLOUR_STEP = 1.6
SHAPE_STEP = 1.17
QUIET_S = 0.02
"silence at either end of a run, before the ramp"
RAMP_S = 0.02
FLOOR = 3e-4
"amplitude of the noise floor, -70 dB: silence in a recording is not digital zero"
HIGHEST_HZ = 7200.0
"partials above are left out: the encoders hear 16 kHz audio"


@dataclass(frozen=True, kw_only=True)
class Timbre:
    pitch_hz: float
    partials: tuple[float, ...]
    "amplitudes of the harmonics 1, 2, 3 ..."
    vibrato_hz: float = 0.0
    vibrato_depth: float = 0.0
    "largest relative change of the pitch"
    plucks_hz: float = 0.0
    "attacks a second; 0 is a steady tone"
    noise: float = 0.0


BY_SHAPE = {
    "circle": {"partials": (1.0, 0.25), "vibrato_hz": 6.0, "vibrato_depth": 0.03},
    "square": {"partials": (1.0, 0.0, 0.7, 0.0, 0.5, 0.0, 0.35)},
    "triangle": {"partials": (1.0, 0.8, 0.6, 0.45, 0.3), "plucks_hz": 5.0, "noise": 0.25},
}


def timbre(name: str) -> Timbre:
    """The timbre of a class such as "red circle"."""
    colour, shape = name.split()
    pitch = LOWEST_HZ * COLOUR_STEP ** COLOURS.index(colour) * SHAPE_STEP ** SHAPES.index(shape)
    return Timbre(pitch_hz=pitch, **BY_SHAPE[shape])  # type: ignore[arg-type]  # rows of BY_SHAPE are Timbre's fields


def render_audio(scene: Scene, rate: int = 44_100) -> NDArray[np.float32]:
    """Stereo float32 [duration * rate, 2] in [-1, 1]; objects sound from their column."""
    noise = np.random.default_rng((scene.seed, scene.index, 1))
    total = np.zeros((scene.duration_s * rate, 2), dtype=np.float32)
    total += noise.standard_normal(total.shape, dtype=np.float32) * np.float32(FLOOR)
    for actor in scene.heard:
        pan = 0.5 * (actor.column - 1)
        sides = np.asarray([1 - pan, 1 + pan], dtype=np.float32)
        for start, end in runs(actor.sounding):
            tone = _tone(actor, end - start, rate, noise)
            total[start * rate : end * rate] += tone[:, None] * sides
    return np.clip(total, -1.0, 1.0)


def render_mono(scene: Scene, rate: int = 16_000) -> NDArray[np.float32]:
    """Mono float32 [duration * rate], mixed down as FFmpeg does, and so decord: (left + right) / sqrt(2)."""
    left, right = render_audio(scene, rate).T
    mixed: NDArray[np.float32] = (left + right) * np.float32(math.sqrt(0.5))
    return mixed.clip(-1.0, 1.0)


def _tone(
    actor: Actor, length_s: int, rate: int, noise: np.random.Generator
) -> NDArray[np.float32]:
    voice = timbre(actor.name)
    pitch = voice.pitch_hz * actor.detune
    times = np.arange(length_s * rate) / rate
    phase = 2 * math.pi * pitch * times
    if voice.vibrato_hz:
        # The integral of the pitch: a sine in frequency is a cosine in phase.
        swing = pitch * voice.vibrato_depth / voice.vibrato_hz
        phase -= swing * np.cos(2 * math.pi * voice.vibrato_hz * times)
    top = min(HIGHEST_HZ, 0.45 * rate)
    wave = np.zeros(len(times))
    for order, amplitude in enumerate(voice.partials, start=1):
        if amplitude and order * pitch < top:
            wave += amplitude * np.sin(order * phase)
    wave /= sum(voice.partials)
    if voice.noise:
        wave += voice.noise * noise.uniform(-1.0, 1.0, len(times))
        wave /= 1 + voice.noise
    if voice.plucks_hz:
        wave *= np.exp(-12.0 * np.mod(times, 1 / voice.plucks_hz))
    # Plucks and many partials are quieter at the same peak: bring every timbre to a similar loudness.
    wave *= {"circle": 0.8, "square": 1.0, "triangle": 1.5}[actor.shape]
    edge = np.minimum(times, length_s - times)
    ramp = np.clip((edge - QUIET_S) / RAMP_S, 0.0, 1.0)
    return (actor.gain * wave * ramp).astype(np.float32)
