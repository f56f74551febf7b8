"""S4, MS3 and AVSS samples: the masks of the objects that are seen while they are heard.

One frame a second, at t = 0, 1 ... 9. All three read the same index maps (crab.synth.index_maps).
"""

from crab.samples import MaskRef, Sample
from crab.synth.index_maps import CLASS_NUMBERS, map_path
from crab.synth.sample import make_sample
from crab.synth.scene import CLASS_NAMES, Actor, Scene, on
from crab.synth.words import spans_in_words, times
from crab.tasks import avss, ms3, s4
from crab.tasks.mask_answer import MaskItem, format_mask_answer

NUM_CLASSES = 1 + len(CLASS_NAMES)
"of AVSS: the background is class 0"


def mask_refs(scene: Scene, sources: list[list[Actor]]) -> tuple[MaskRef, ...]:
    """The masks of all frames; `sources[i]` are the objects that belong to the mask of frame i."""
    return tuple(
        MaskRef(
            frame=frame,
            file=map_path(scene, frame),
            values=tuple(CLASS_NUMBERS[actor.name] for actor in actors),
        )
        for frame, actors in enumerate(sources)
    )


def s4_samples(scene: Scene) -> list[Sample]:
    """One where a single object is seen while heard. Only the frames in which it is both are labelled."""
    sources = _sources(scene)
    if len(sources) != 1:
        return []
    on_by_second = _on_by_second(scene)
    return [
        make_sample(
            scene,
            task="s4",
            instruction=s4.INSTRUCTION,
            reasoning=_reasoning(scene),
            answer=format_mask_answer(_items(on_by_second)),
            label={"event": sources[0].name},
            masks=tuple(mask for mask in mask_refs(scene, on_by_second) if mask.values),
        )
    ]


def ms3_samples(scene: Scene) -> list[Sample]:
    """One where two or more objects are each seen while heard, together or one after the other."""
    if len(_sources(scene)) < 2:
        return []
    on_by_second = _on_by_second(scene)
    events = {
        str(second): [actor.name for actor in actors]
        for second, actors in enumerate(on_by_second)
        if actors
    }
    return [
        make_sample(
            scene,
            task="ms3",
            instruction=ms3.INSTRUCTION,
            reasoning=_reasoning(scene),
            answer=format_mask_answer(_items(on_by_second)),
            label={"events_by_second": events},
            masks=mask_refs(scene, on_by_second),
        )
    ]


def avss_samples(scene: Scene) -> list[Sample]:
    on_by_second = _on_by_second(scene)
    names = {str(number): name for name, number in CLASS_NUMBERS.items()}
    return [
        make_sample(
            scene,
            task="avss",
            instruction=avss.INSTRUCTION,
            reasoning=_reasoning(scene),
            answer=format_mask_answer(_items(on_by_second)),
            label={"num_classes": NUM_CLASSES, "names": names},
            masks=mask_refs(scene, on_by_second),
        )
    ]


def _sources(scene: Scene) -> list[Actor]:
    return [actor for actor in scene.actors if actor.together]


def _on_by_second(scene: Scene) -> list[list[Actor]]:
    return [
        [actor for actor in scene.actors if on(actor.together, second)]
        for second in range(scene.duration_s)
    ]


def _items(on_by_second: list[list[Actor]]) -> list[MaskItem]:
    """The longest runs of seconds in which the same objects, at least one, are on."""
    items = []
    start = 0
    for second in range(1, len(on_by_second) + 1):
        if second == len(on_by_second) or on_by_second[second] != on_by_second[start]:
            if names := tuple(actor.name for actor in on_by_second[start]):
                items.append(MaskItem(start_s=start, end_s=second, names=names))
            start = second
    return items


def _reasoning(scene: Scene) -> str:
    """The times of the objects that are seen while heard, and no others: the spans of the answer follow from them."""
    told = [
        times(actor.name, actor.visible, actor.sounding).removesuffix(".")
        + f", both {spans_in_words(actor.together)}."
        for actor in _sources(scene)
    ]
    return " ".join(told) or "Nothing is seen and heard at once."
