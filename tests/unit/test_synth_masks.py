"""Masks and boxes: exact to the pixel by a second rendering, and of the right objects in the right seconds."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from crab.samples import Sample
from crab.synth import (
    CLASS_NAMES,
    CLASS_NUMBERS,
    Actor,
    Scene,
    index_map,
    make_scene,
    samples_of,
    transcript,
)
from crab.tasks.mask_answer import MaskItem, parse_mask_answer

SCENES = [make_scene(6, index) for index in range(120)]
SAMPLES = [(sample, scene) for scene in SCENES for sample in samples_of(scene)]


def of(task: str) -> list[tuple[Sample, Scene]]:
    return [(sample, scene) for sample, scene in SAMPLES if sample.task == task]


def drawn(actor: Actor, t_s: float, grow: float) -> NDArray[np.bool_]:
    """[224, 224]: pixels whose centres lie in the shape, grown by `grow` pixels. Squares and triangles as polygons."""
    centre = 224 * np.array(actor.centre(t_s))
    radius = 224 * actor.radius
    points = np.stack(np.meshgrid(np.arange(224), np.arange(224)), axis=-1) + 0.5 - centre
    if actor.shape == "circle":
        return (points**2).sum(-1) <= (radius + grow) ** 2
    if actor.shape == "square":
        angles, reach = [45, 135, 225, 315], 0.85 * math.sqrt(2) * radius
    else:
        angles, reach = [30, 150, 270], radius
    corners = [
        (reach * math.cos(math.radians(a)), reach * math.sin(math.radians(a))) for a in angles
    ]
    inside = np.ones((224, 224), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        side = math.hypot(x2 - x1, y2 - y1)
        depth = ((x2 - x1) * (points[..., 1] - y1) - (y2 - y1) * (points[..., 0] - x1)) / side
        inside &= depth >= -grow
    return inside


def on_by_second(scene: Scene) -> list[set[str]]:
    """Names of what is both seen and heard in each second, from the transcript."""
    return [
        {item["name"] for item in words["visible"]} & set(words["sounding"])
        for words in transcript(scene)["seconds"]
    ]


def test_index_maps_equal_another_rendering() -> None:
    for scene in SCENES[:12]:
        for second in range(10):
            pixels = index_map(scene, second)
            assert (pixels.shape, pixels.dtype) == ((224, 224), np.uint8)
            visible = [actor for actor in scene.actors if actor.visible >> second & 1]
            assert set(np.unique(pixels)) == {0} | {
                1 + CLASS_NAMES.index(actor.name) for actor in visible
            }
            for actor in visible:
                mask = pixels == 1 + CLASS_NAMES.index(actor.name)
                # A thousandth of a pixel is left to rounding.
                assert (drawn(actor, second, -1e-3) <= mask).all()
                assert (mask <= drawn(actor, second, 1e-3)).all()


def test_the_box_is_the_tight_box_of_the_only_sounding_object() -> None:
    for sample, scene in of("arig"):
        second, (x1, y1, x2, y2) = sample.label["second"], sample.label["box"]
        assert on_by_second(scene)[second] == {sample.label["event"]}
        assert f" at second {second} " in sample.instruction
        mask = index_map(scene, second) == CLASS_NUMBERS[sample.label["event"]]
        assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
        assert mask[[y1, y2 - 1]].any(axis=1).all()
        assert mask[:, [x1, x2 - 1]].any(axis=0).all()


def test_arig_is_asked_about_every_second() -> None:
    assert {sample.label["second"] for sample, _ in of("arig")} == set(range(10))


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_masks_hold_what_is_both_seen_and_heard(task: str) -> None:
    assert of(task)
    for sample, scene in of(task):
        want = on_by_second(scene)
        frames = [second for second in range(10) if task != "s4" or want[second]]
        assert [mask.frame for mask in sample.masks] == frames
        for mask in sample.masks:
            assert mask.file == f"masks/{sample.clip}/{mask.frame}.png"
            assert mask.values is not None
            assert {CLASS_NAMES[value - 1] for value in mask.values} == want[mask.frame]


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_spans_name_what_is_both_seen_and_heard_and_are_as_long_as_can_be(task: str) -> None:
    for sample, scene in of(task):
        items = items_of(sample)
        told: list[list[str]] = [[] for _ in range(10)]
        for item in items:
            for second in range(item.start_s, item.end_s):
                told[second] = list(item.names)
        assert [set(names) for names in told] == on_by_second(scene)
        assert all(names == sorted(names, key=CLASS_NAMES.index) for names in told)
        for one, other in itertools.pairwise(items):
            assert one.end_s < other.start_s or one.names != other.names


def test_s4_has_one_source_and_ms3_more() -> None:
    for sample, scene in SAMPLES:
        sources = set().union(*on_by_second(scene))
        if sample.task == "s4":
            assert sources == {sample.label["event"]}
        if sample.task == "ms3":
            assert len(sources) > 1
            events = sample.label["events_by_second"]
            assert [set(events.get(str(s), [])) for s in range(10)] == on_by_second(scene)
    for scene in SCENES:
        tasks = {sample.task for sample in samples_of(scene)}
        sources = set().union(*on_by_second(scene))
        assert ("s4" in tasks, "ms3" in tasks) == (len(sources) == 1, len(sources) > 1)


def test_avss_names_its_classes() -> None:
    for sample, _ in of("avss"):
        assert sample.label["num_classes"] == 13
        assert sample.label["names"] == {str(i + 1): name for i, name in enumerate(CLASS_NAMES)}


def items_of(sample: Sample) -> tuple[MaskItem, ...]:
    items = parse_mask_answer(sample.answer)
    assert items is not None
    return items
