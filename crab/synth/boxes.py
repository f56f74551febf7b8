"""ARIG samples: the box of the one object that is both seen and heard at a second."""

import numpy as np

from crab.samples import Sample
from crab.synth.make import Dice
from crab.synth.render import shape_mask
from crab.synth.sample import make_sample
from crab.synth.scene import Actor, Scene, on
from crab.synth.words import listing
from crab.tasks import arig


def tight_box(scene: Scene, actor: Actor, second: int) -> arig.Box:
    """The smallest box around the actor's pixels at t = `second`, where it must be visible."""
    mask = shape_mask(scene, actor, second, arig.SIZE)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def arig_samples(scene: Scene) -> list[Sample]:
    """One, at a second drawn from those in which exactly one object is both seen and heard."""
    found = [
        (second, sources[0])
        for second in range(scene.duration_s)
        if len(sources := [actor for actor in scene.actors if on(actor.together, second)]) == 1
    ]
    if not found:
        return []
    second, actor = Dice(scene.seed, scene.index, 3).pick(found)
    box = tight_box(scene, actor, second)
    seen = listing(a.name for a in scene.actors if on(a.visible, second))
    heard = listing(a.name for a in scene.actors if on(a.sounding, second))
    return [
        make_sample(
            scene,
            task="arig",
            instruction=arig.instruction(second),
            reasoning=f"At second {second} seen: {seen}; heard: {heard}.",
            answer=arig.format_answer(actor.name, box),
            label={"event": actor.name, "box": list(box), "second": second},
        )
    ]
