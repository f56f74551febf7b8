"""What the samples of a clip have in common: its split, its file, its id."""

from typing import Any

from crab.samples import MaskRef, Sample, Split
from crab.synth.scene import Scene


def split_of(index: int) -> Split:
    """Every fifth clip is for testing. By clip, so that no test clip was ever trained on with another question."""
    return "test" if index % 5 == 4 else "train"


def video_path(scene: Scene) -> str:
    """Where the clip lies, relative to the samples file."""
    return f"clips/{scene.clip}.mp4"


def make_sample(
    scene: Scene,
    *,
    task: str,
    instruction: str,
    answer: str,
    label: dict[str, Any],
    reasoning: str = "",
    masks: tuple[MaskRef, ...] = (),
    number: int | None = None,
) -> Sample:
    """A sample of the scene's clip. `number` tells the samples of one task and clip apart."""
    return Sample(
        id=f"{scene.clip}-{task}" + ("" if number is None else f"-{number}"),
        task=task,
        split=split_of(scene.index),
        clip=scene.clip,
        video=video_path(scene),
        instruction=instruction,
        reasoning=reasoning,
        answer=answer,
        label=label,
        masks=masks,
    )
