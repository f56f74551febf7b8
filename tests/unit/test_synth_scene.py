"""Scenes: seeded, within their rules, and with the variety that the tasks need."""

from collections import Counter

import numpy as np
import pytest

from crab.synth import CLASS_NAMES, make_scene, targets, transcript
from crab.tasks.spans import grid, runs

SCENES = [make_scene(0, index) for index in range(400)]
PINNED = [
    ("red circle", "right", 0, ((0, 5), (8, 10)), ((0, 2), (8, 9))),
    ("green circle", "right", 1, ((0, 6),), ((1, 9),)),
]


def test_spans_and_bits_are_inverse() -> None:
    for bits in range(1 << 10):
        assert grid(runs(bits)) == bits
    assert grid([(6, 8)]) == 0b0011000000
    assert runs(0b0011000000) == ((6, 8),)
    with pytest.raises(ValueError, match="0 <= start <= end <= 10"):
        grid([(3, 11)])


def test_a_scene_depends_on_seed_and_index_only() -> None:
    assert make_scene(5, 7) == make_scene(5, 7)
    assert make_scene(5, 7) != make_scene(5, 8)
    assert make_scene(5, 7).actors != make_scene(7, 5).actors
    with pytest.raises(ValueError, match="0 or more"):
        make_scene(-1, 0)


def test_this_scene_stays_as_it_is() -> None:
    # Clips that teams have stored were made from these values. If this fails, raise SCENE_VERSION.
    scene = make_scene(0, 0)
    facts = [(a.name, a.position, a.row, runs(a.visible), runs(a.sounding)) for a in scene.actors]
    assert facts == PINNED


def test_actors_are_unique_and_stay_in_their_cells() -> None:
    for scene in SCENES:
        assert 2 <= len(scene.actors) <= 4
        assert len({actor.name for actor in scene.actors}) == len(scene.actors)
        for actor in scene.actors:
            for t_s in np.linspace(0, 9.96, 40):
                x, y = actor.centre(float(t_s))
                assert (
                    actor.column / 3 < x - actor.radius < x + actor.radius < (actor.column + 1) / 3
                )
                assert actor.row / 2 < y - actor.radius < y + actor.radius < (actor.row + 1) / 2


def test_movement_is_smooth_and_there() -> None:
    for actor in SCENES[0].actors:
        path = np.array([actor.centre(number / 25) for number in range(250)])
        steps = np.abs(np.diff(path, axis=0)).max()
        assert 0 < steps < 0.02
        assert np.ptp(path, axis=0).max() > 0.03


def test_the_event_is_the_only_audio_visual_span() -> None:
    events = 0
    for scene in SCENES:
        visible, sounding = targets(scene)
        together = visible & sounding
        event = scene.event()
        if event is None:
            starts = (np.diff(together, axis=0, prepend=0) == 1).sum()
            assert starts != 1 or together.sum() < 2
            continue
        events += 1
        actor, (start, end) = event
        want = np.zeros_like(together)
        want[start:end, CLASS_NAMES.index(actor.name)] = 1
        assert end - start >= 2
        np.testing.assert_array_equal(together, want)
    assert 0.5 < events / len(SCENES) < 0.85


def test_sight_and_sound_come_apart_often_enough_to_matter() -> None:
    actors = [actor for scene in SCENES for actor in scene.actors]
    unseen_sound = sum(bool(actor.sounding & ~actor.visible) for actor in actors)
    silent_sight = sum(bool(actor.visible & ~actor.sounding) for actor in actors)
    assert unseen_sound > len(actors) / 4
    assert silent_sight > len(actors) / 4
    assert set(Counter(actor.name for actor in actors)) == set(CLASS_NAMES)


def test_transcripts_and_targets_tell_the_same() -> None:
    for scene in SCENES[:50]:
        visible, sounding = targets(scene)
        told = transcript(scene)
        assert told["clip"] == scene.clip
        assert len(told["seconds"]) == len(visible) == len(sounding) == 10
        for second, words in enumerate(told["seconds"]):
            seen = {CLASS_NAMES[column] for column in np.flatnonzero(visible[second])}
            heard = {CLASS_NAMES[column] for column in np.flatnonzero(sounding[second])}
            assert {item["name"] for item in words["visible"]} == seen
            assert set(words["sounding"]) == heard
