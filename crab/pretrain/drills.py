"""Drills: short questions whose every answer token must be read off the symbols, for the LLM's pretraining alone.

The tasks' own texts are mostly template, and a list must be right before the times in it can be learnt. A drill names
the one thing that it asks for: the times of an object, what is there at a second, the box of an object.
"""

from crab.samples import Sample
from crab.synth.boxes import tight_box
from crab.synth.make import Dice
from crab.synth.sample import make_sample
from crab.synth.scene import Scene, on
from crab.synth.words import listing, times


def drills(scene: Scene, dice: Dice, count: int, *, first: bool = False) -> list[Sample]:
    """`count` drills about random objects and seconds, each asking for one thing. `first`: places alone, the easiest:
    from them the LLM learns to find an object's slots, on which all others build."""
    kinds = (_place,) if first else (_times, _times, _second, _box, _box, _place)
    return [dice.pick(kinds)(scene, dice) for _ in range(count)]


def _times(scene: Scene, dice: Dice) -> Sample:
    actor = dice.pick(scene.actors)
    question = f"Times of the {actor.name}?"
    return _drill(scene, "times", question, times(actor.name, actor.visible, actor.sounding))


def _second(scene: Scene, dice: Dice) -> Sample:
    second = dice.below(scene.duration_s)
    seen = listing(actor.name for actor in scene.actors if on(actor.visible, second))
    heard = listing(actor.name for actor in scene.actors if on(actor.sounding, second))
    answer = f"At second {second} seen: {seen}; heard: {heard}."
    return _drill(scene, "second", f"What is there at second {second}?", answer)


def _place(scene: Scene, dice: Dice) -> Sample:
    """Where an object moves; of one that is never in view, its times are asked for instead."""
    if not scene.seen:
        return _times(scene, dice)
    actor = dice.pick(scene.seen)
    return _drill(
        scene, "place", f"Where is the {actor.name}?", f"The {actor.name} moves {actor.place}."
    )


def _box(scene: Scene, dice: Dice) -> Sample:
    """Of an object that is in view; where that never happens, times are asked for instead."""
    seen = [
        (actor, second)
        for actor in scene.actors
        for second in range(scene.duration_s)
        if on(actor.visible, second)
    ]
    if not seen:
        return _times(scene, dice)
    actor, second = dice.pick(seen)
    x1, y1, x2, y2 = tight_box(scene, actor, second)
    question = f"Box of the {actor.name} at second {second}?"
    return _drill(
        scene, "box", question, f"The {actor.name} is at <obj>({x1},{y1})({x2},{y2})</obj>"
    )


def _drill(scene: Scene, kind: str, instruction: str, answer: str) -> Sample:
    return make_sample(
        scene, task=f"drill-{kind}", instruction=instruction, answer=answer, label={}
    )
