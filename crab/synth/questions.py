"""Samples of a scene for AVE, AVVP and AVQA: instruction, reasoning in prose, tagged answer, exact label.

Reasoning comes from fixed templates of at most 60 words and names the evidence that the answer follows from.
"""

from typing import Any

from crab.samples import Sample, Split
from crab.synth.avqa import ask
from crab.synth.scene import Actor, Scene
from crab.synth.words import listing, times
from crab.tasks import ave, avqa, avvp
from crab.tasks.spans import runs

QUESTIONS_PER_CLIP = 4


def split_of(index: int) -> Split:
    """Every fifth clip is for testing. By clip, so that no test clip was ever trained on with another question."""
    return "test" if index % 5 == 4 else "train"


def video_path(scene: Scene) -> str:
    """Where the clip lies, relative to the samples file."""
    return f"clips/{scene.clip}.mp4"


def samples_of(scene: Scene, questions_per_clip: int = QUESTIONS_PER_CLIP) -> list[Sample]:
    """One AVE sample where the scene has one event, one AVVP sample, and up to `questions_per_clip` AVQA samples."""
    made = [_avvp(scene)]
    if (event := scene.event()) is not None:
        made.insert(0, _ave(scene, event[0], *event[1]))
    for number, question in enumerate(ask(scene, questions_per_clip)):
        made.append(
            _sample(
                scene,
                task="avqa",
                suffix=f"avqa-{number}",
                instruction=avqa.instruction(question.text),
                reasoning=question.reasoning,
                answer=avqa.format_answer(question.answer),
                label={
                    "answer": question.answer,
                    "question": question.text,
                    "type": list(question.type),
                },
            )
        )
    return made


def _ave(scene: Scene, actor: Actor, start_s: int, end_s: int) -> Sample:
    reasoning = (
        f"Seen: {listing(a.name for a in scene.seen)}. Heard: {listing(a.name for a in scene.heard)}."
        f" {times(actor.name, actor.visible, actor.sounding)}"
    )
    return _sample(
        scene,
        task="ave",
        suffix="ave",
        instruction=ave.INSTRUCTION,
        reasoning=reasoning,
        answer=ave.format_answer(actor.name, start_s, end_s),
        label={"event": actor.name, "start_s": start_s, "end_s": end_s},
    )


def _avvp(scene: Scene) -> Sample:
    visual = [(actor.name, *run) for actor in scene.seen for run in runs(actor.visible)]
    audio = [(actor.name, *run) for actor in scene.heard for run in runs(actor.sounding)]
    both = listing(actor.name for actor in scene.actors if actor.together)
    reasoning = (
        f"Seen: {listing(a.name for a in scene.seen)}. Heard: {listing(a.name for a in scene.heard)}."
        f" Seen and heard at once: {both}."
    )
    return _sample(
        scene,
        task="avvp",
        suffix="avvp",
        instruction=avvp.INSTRUCTION,
        reasoning=reasoning,
        answer=avvp.format_answer(visual, audio),
        label={
            "visual": [list(event) for event in visual],
            "audio": [list(event) for event in audio],
        },
    )


def _sample(
    scene: Scene,
    *,
    task: str,
    suffix: str,
    instruction: str,
    reasoning: str,
    answer: str,
    label: dict[str, Any],
) -> Sample:
    return Sample(
        id=f"{scene.clip}-{suffix}",
        task=task,
        split=split_of(scene.index),
        clip=scene.clip,
        video=video_path(scene),
        instruction=instruction,
        reasoning=reasoning,
        answer=answer,
        label=label,
    )
