"""Questions about a scene: the nine types of MUSIC-AVQA, each with its exact answer and the way to it.

Each type is a function from a scene to all the questions it can ask there. One is then drawn answer first, question
second, so "yes" and "no" (and left, middle, right) are equally common wherever a scene allows both.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from crab.synth.make import Dice
from crab.synth.scene import CLASS_NAMES, Actor, Scene, on
from crab.synth.words import NUMBERS, listing, times
from crab.tasks.spans import runs

Type = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Question:
    type: Type
    text: str
    reasoning: str
    answer: str


def audio_counting(scene: Scene) -> list[tuple[str, str, str]]:
    heard = scene.heard
    return [
        (
            "How many objects are heard in the clip?",
            f"Heard at some time: {listing(a.name for a in heard)}.",
            NUMBERS[len(heard)],
        )
    ]


def visual_counting(scene: Scene) -> list[tuple[str, str, str]]:
    seen = scene.seen
    return [
        (
            "How many objects are seen in the clip?",
            f"Seen at some time: {listing(a.name for a in seen)}.",
            NUMBERS[len(seen)],
        )
    ]


def audio_visual_counting(scene: Scene) -> list[tuple[str, str, str]]:
    """Over the whole clip; second by second where the clip has its one event, as the answer would always be one."""
    if scene.event() is None:
        both = [actor.name for actor in scene.actors if actor.together]
        return [
            (
                "How many objects are heard while they are in view?",
                f"Seen and heard at once: {listing(both)}.",
                NUMBERS[len(both)],
            )
        ]
    questions = []
    for second in range(scene.duration_s):
        seen = [actor.name for actor in scene.actors if on(actor.visible, second)]
        heard = [actor.name for actor in scene.actors if on(actor.sounding, second)]
        questions.append(
            (
                f"How many objects are both seen and heard at second {second}?",
                f"At second {second} seen: {listing(seen)}. Heard: {listing(heard)}.",
                NUMBERS[len(set(seen) & set(heard))],
            )
        )
    return questions


def audio_visual_existential(scene: Scene) -> list[tuple[str, str, str]]:
    absent = [name for name in CLASS_NAMES if name not in {actor.name for actor in scene.actors}]
    # One class that is not there at all, another in every clip.
    questions = [_existence(absent[scene.index % len(absent)], None)]
    return questions + [_existence(actor.name, actor) for actor in scene.actors]


def _existence(name: str, actor: Actor | None) -> tuple[str, str, str]:
    visible, sounding = (actor.visible, actor.sounding) if actor else (0, 0)
    return (
        f"Is the {name} heard while it is in view?",
        times(name, visible, sounding),
        "yes" if visible & sounding else "no",
    )


def visual_location(scene: Scene) -> list[tuple[str, str, str]]:
    return [
        (
            f"Where is the {actor.name}?",
            f"The {actor.name} moves {actor.place}.",
            actor.position,
        )
        for actor in scene.seen
    ]


def audio_visual_location(scene: Scene) -> list[tuple[str, str, str]]:
    first = _first_heard(scene)
    if first is None or not first.visible:
        return []
    start = runs(first.sounding)[0][0]
    reasoning = f"The {first.name} is heard first, from {start}. It is seen {first.place}."
    return [("Where is the object that is heard first?", reasoning, first.position)]


def audio_visual_temporal(scene: Scene) -> list[tuple[str, str, str]]:
    first = _first_heard(scene)
    if first is None:
        return []
    starts = ", ".join(f"{actor.name} at {runs(actor.sounding)[0][0]}" for actor in scene.heard)
    return [("Which object is heard first?", f"Sounds begin: {starts}.", first.name)]


def audio_comparative(scene: Scene) -> list[tuple[str, str, str]]:
    questions = []
    for one, other in itertools.permutations(scene.heard, 2):
        lengths = one.sounding.bit_count(), other.sounding.bit_count()
        if lengths[0] != lengths[1]:
            questions.append(
                (
                    f"Is the {one.name} heard for longer than the {other.name}?",
                    f"The {one.name} is heard for {lengths[0]} seconds, the {other.name} for {lengths[1]}.",
                    "yes" if lengths[0] > lengths[1] else "no",
                )
            )
    return questions


def audio_visual_comparative(scene: Scene) -> list[tuple[str, str, str]]:
    questions = []
    for actor in scene.actors:
        seen, heard = actor.visible.bit_count(), actor.sounding.bit_count()
        if seen == heard:
            continue
        # Asked both ways round: most objects are seen for longer, and "yes" must not be the safe answer.
        for more, less, answer in (
            ("seen", "heard", seen > heard),
            ("heard", "seen", heard > seen),
        ):
            questions.append(
                (
                    f"Is the {actor.name} {more} for longer than it is {less}?",
                    f"The {actor.name} is seen for {seen} seconds and heard for {heard}.",
                    "yes" if answer else "no",
                )
            )
    return questions


def _first_heard(scene: Scene) -> Actor | None:
    """The object whose sound begins before all others; None where two begin together or nothing sounds."""
    by_start = sorted(scene.heard, key=lambda actor: runs(actor.sounding)[0])
    starts = [runs(actor.sounding)[0][0] for actor in by_start]
    if not starts or (len(starts) > 1 and starts[0] == starts[1]):
        return None
    return by_start[0]


QUESTIONS: dict[Type, Callable[[Scene], list[tuple[str, str, str]]]] = {
    ("Audio", "Counting"): audio_counting,
    ("Visual", "Location"): visual_location,
    ("Audio-Visual", "Existential"): audio_visual_existential,
    ("Visual", "Counting"): visual_counting,
    ("Audio-Visual", "Temporal"): audio_visual_temporal,
    ("Audio", "Comparative"): audio_comparative,
    ("Audio-Visual", "Counting"): audio_visual_counting,
    ("Audio-Visual", "Location"): audio_visual_location,
    ("Audio-Visual", "Comparative"): audio_visual_comparative,
}
"type -> all (question, reasoning, answer) that a scene allows; the order is that of the rotation"


def ask(scene: Scene, count: int) -> list[Question]:
    """Up to `count` questions of different types; the types take turns from clip to clip."""
    dice = Dice(scene.seed, scene.index, 2)
    types = list(QUESTIONS)
    turn = scene.index * count % len(types)
    asked: list[Question] = []
    for kind in types[turn:] + types[:turn]:
        options = QUESTIONS[kind](scene)
        if not options or len(asked) == count:
            continue
        answer = dice.pick(sorted({option[2] for option in options}))
        text, reasoning, answer = dice.pick([option for option in options if option[2] == answer])
        asked.append(Question(type=kind, text=text, reasoning=reasoning, answer=answer))
    return asked
