"""Numbers, lists and spans in words: the small phrases that reasoning is made of."""

from collections.abc import Iterable

from crab.synth.scene import Scene
from crab.tasks.spans import runs

NUMBERS = ("zero", "one", "two", "three", "four")


def listing(names: Iterable[str]) -> str:
    """ "red circle, blue square" or "nothing"."""
    return ", ".join(names) or "nothing"


def seen_and_heard(scene: Scene) -> str:
    """What is seen at some time and what is heard at some time, as two sentences."""
    seen, heard = (listing(actor.name for actor in some) for some in (scene.seen, scene.heard))
    return f"Seen: {seen}. Heard: {heard}."


def spans_in_words(bits: int) -> str:
    """ "from 0 to 3 and from 5 to 8" or "never"."""
    return " and ".join(f"from {start} to {end}" for start, end in runs(bits)) or "never"


def times(name: str, visible: int, sounding: int) -> str:
    """When a class is seen and heard, as one sentence."""
    return f"Times of the {name}: seen {spans_in_words(visible)}, heard {spans_in_words(sounding)}."
