"""AVCap samples: one short, true sentence an object, in vocabulary order."""

from crab.samples import Sample
from crab.synth.sample import make_sample
from crab.synth.scene import Actor, Scene
from crab.tasks import avcap


def avcap_samples(scene: Scene) -> list[Sample]:
    """One. It has no reasoning: a caption is evidence itself, and has no tag that would set it off."""
    caption = caption_of(scene)
    return [
        make_sample(
            scene,
            task="avcap",
            instruction=avcap.INSTRUCTION,
            answer=caption,
            label={"captions": [caption]},
        )
    ]


def caption_of(scene: Scene) -> str:
    return " ".join(_sentence(actor) for actor in scene.actors)


def _sentence(actor: Actor) -> str:
    if not actor.visible:
        return f"A {actor.name} sounds out of view."
    moves = f"A {actor.name} moves {actor.place}"
    if not actor.sounding:
        return f"{moves} in silence."
    return f"{moves} and sounds." if actor.together else f"{moves} and sounds when out of view."
