"""Pictures and sounds: deterministic, and they show and sound exactly what the scene says."""

import itertools

import numpy as np
import pytest

from crab.synth import (
    CLASS_NAMES,
    Scene,
    make_scene,
    render_audio,
    render_frame,
    render_mono,
    shape_mask,
    targets,
)
from crab.synth.render import RGB
from crab.synth.sound import timbre

SCENES = [make_scene(1, index) for index in range(12)]
RATE = 16_000


def test_the_same_scene_gives_the_same_pixels_and_samples() -> None:
    for index in range(3):
        one, other = make_scene(4, index), make_scene(4, index)
        assert render_frame(one, 3.4).tobytes() == render_frame(other, 3.4).tobytes()
        assert render_audio(one).tobytes() == render_audio(other).tobytes()
    assert render_audio(make_scene(4, 0)).tobytes() != render_audio(make_scene(5, 0)).tobytes()


@pytest.mark.parametrize("size", [64, 112, 224])
def test_each_visible_shape_is_there_in_its_colour_and_nothing_else(size: int) -> None:
    for scene in SCENES:
        for second in range(10):
            frame = render_frame(scene, second, size)
            assert frame.shape == (size, size, 3)
            assert frame.dtype == np.uint8
            explained = np.zeros((size, size), dtype=bool)
            for actor in scene.actors:
                mask = shape_mask(scene, actor, second, size)
                assert mask.any() == bool(actor.visible >> second & 1)
                if not mask.any():
                    continue
                third = size / 3
                columns = np.flatnonzero(mask.any(axis=0))
                assert (
                    actor.column * third <= columns[0] <= columns[-1] < (actor.column + 1) * third
                )
                inner = (
                    mask
                    & np.roll(mask, 1, 0)
                    & np.roll(mask, -1, 0)
                    & np.roll(mask, 1, 1)
                    & np.roll(mask, -1, 1)
                )
                assert inner.any()
                assert (frame[inner] == RGB[actor.colour]).all()
                explained |= grown(mask, 3)
            # The background is grey: any colour outside the shapes would be a ghost.
            rest = frame[~explained].astype(int)
            assert (rest.max(axis=1) == rest.min(axis=1)).all()


def grown(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask and all pixels within `steps`: soft edges reach furthest at the corners of a triangle."""
    for _ in range(steps):
        mask = np.logical_or.reduce(
            [np.roll(mask, shift, (0, 1)) for shift in itertools.product((-1, 0, 1), repeat=2)]
        )
    return mask


def test_shapes_have_their_own_outline() -> None:
    fill = {}
    for scene in (make_scene(0, index) for index in range(30)):
        for actor in scene.seen:
            second = (actor.visible & -actor.visible).bit_length() - 1
            mask = shape_mask(scene, actor, second, 448)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            fill.setdefault(actor.shape, []).append(mask.sum() / (len(rows) * len(columns)))
    assert np.allclose(fill["circle"], np.pi / 4, atol=0.03)
    assert np.allclose(fill["square"], 1, atol=0.03)
    assert np.allclose(fill["triangle"], 0.5, atol=0.03)


def test_times_outside_the_clip_are_refused() -> None:
    for t_s in (-0.1, 10.0):
        with pytest.raises(ValueError, match="from 0 to 10"):
            render_frame(SCENES[0], t_s)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_seconds_are_loud_exactly_when_something_sounds(rate: int) -> None:
    for scene in SCENES:
        stereo = render_audio(scene, rate)
        assert stereo.shape == (10 * rate, 2)
        assert stereo.dtype == np.float32
        assert np.abs(stereo).max() < 1
        loudness = np.sqrt((stereo.reshape(10, -1) ** 2).mean(axis=1))
        sounding = targets(scene)[1].any(axis=1)
        assert (loudness[sounding] > 0.005).all()
        assert (loudness[~sounding] < 0.001).all()


def test_objects_sound_from_their_side() -> None:
    for scene in SCENES:
        if len(scene.heard) != 1:
            continue
        left, right = (render_audio(scene, RATE) ** 2).sum(axis=0)
        assert np.sign(round(float(np.log2(right / left)), 1)) == scene.heard[0].column - 1


def test_mono_is_the_downmix_of_a_decoder() -> None:
    stereo = render_audio(SCENES[0], RATE)
    np.testing.assert_allclose(
        render_mono(SCENES[0], RATE), stereo.sum(axis=1) / np.sqrt(2), atol=1e-6
    )


def test_every_class_has_its_own_pitch() -> None:
    pitches = sorted(timbre(name).pitch_hz for name in CLASS_NAMES)
    assert min(high / low for low, high in itertools.pairwise(pitches)) > 1.15


def test_a_second_of_sound_tells_the_class() -> None:
    """The nearest template names every class heard alone, in scenes that the templates were not made from."""
    templates = {}
    for scene in (make_scene(100, index) for index in range(150)):
        for name, spectrum in alone(scene):
            templates.setdefault(name, []).append(spectrum)
    means = np.array([np.mean(templates[name], axis=0) for name in CLASS_NAMES])
    right = total = 0
    for scene in (make_scene(101, index) for index in range(60)):
        for name, spectrum in alone(scene):
            total += 1
            right += CLASS_NAMES[int(np.argmin(((means - spectrum) ** 2).sum(axis=1)))] == name
    assert total > 30
    assert right / total > 0.95


def alone(scene: Scene) -> list[tuple[str, np.ndarray]]:
    """Log energies in third-of-a-semitone bands of the first second in which one class sounds alone."""
    sounding = targets(scene)[1]
    seconds = np.flatnonzero(sounding.sum(axis=1) == 1)
    if not len(seconds):
        return []
    second = int(seconds[0])
    piece = render_mono(scene, RATE)[second * RATE : (second + 1) * RATE]
    power = np.abs(np.fft.rfft(piece)) ** 2
    edges = np.geomspace(200, 7000, 128).astype(int)
    bands = np.log(np.add.reduceat(power, edges)[:-1] + 1e-3)
    return [(CLASS_NAMES[int(np.flatnonzero(sounding[second])[0])], bands - bands.mean())]
