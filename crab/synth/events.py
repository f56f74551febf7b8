"""AVE and AVVP samples: what is seen and heard when.

Reasoning comes from fixed templates and names the evidence that the answer follows from.
"""

from crab.samples import Sample
from crab.synth.sample import make_sample
from crab.synth.scene import Scene
from crab.synth.words import listing, seen_and_heard, times
from crab.tasks import ave, avvp
from crab.tasks.spans import runs


def ave_samples(scene: Scene) -> list[Sample]:
    """One where the scene has exactly one event."""
    event = scene.event()
    if event is None:
        return []
    actor, (start_s, end_s) = event
    return [
        make_sample(
            scene,
            task="ave",
            instruction=ave.INSTRUCTION,
            reasoning=f"{seen_and_heard(scene)} {times(actor.name, actor.visible, actor.sounding)}",
            answer=ave.format_answer(actor.name, start_s, end_s),
            label={"event": actor.name, "start_s": start_s, "end_s": end_s},
        )
    ]


def avvp_samples(scene: Scene) -> list[Sample]:
    visual = [(actor.name, *run) for actor in scene.seen for run in runs(actor.visible)]
    audio = [(actor.name, *run) for actor in scene.heard for run in runs(actor.sounding)]
    both = listing(actor.name for actor in scene.actors if actor.together)
    return [
        make_sample(
            scene,
            task="avvp",
            instruction=avvp.INSTRUCTION,
            reasoning=f"{seen_and_heard(scene)} Seen and heard at once: {both}.",
            answer=avvp.format_answer(visual, audio),
            label={
                "visual": [list(event) for event in visual],
                "audio": [list(event) for event in audio],
            },
        )
    ]
