"""What is there, second by second, as symbols and as targets: for pretraining without pictures and sounds.

A tiny LLM can learn the tasks from transcripts before it ever sees a feature, and the tiny encoders learn to name what
is seen and heard from the multi-label targets.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab.synth.scene import CLASS_NAMES, Scene, on


def transcript(scene: Scene) -> dict[str, Any]:
    """{"clip", "seconds": ten times {"visible": [{"name", "position"}], "sounding": [name]}}, in vocabulary order.

    `position` is left, middle or right. Second i is the time [i, i + 1).
    """
    return {
        "clip": scene.clip,
        "seconds": [
            {
                "visible": [
                    {"name": actor.name, "position": actor.position}
                    for actor in scene.actors
                    if on(actor.visible, second)
                ],
                "sounding": [actor.name for actor in scene.actors if on(actor.sounding, second)],
            }
            for second in range(scene.duration_s)
        ],
    }


def targets(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(visible, sounding), each uint8 [seconds, classes] of 0 and 1; classes in the order of CLASS_NAMES."""
    visible = np.zeros((scene.duration_s, len(CLASS_NAMES)), dtype=np.uint8)
    sounding = np.zeros_like(visible)
    for actor in scene.actors:
        column = CLASS_NAMES.index(actor.name)
        for second in range(scene.duration_s):
            visible[second, column] = on(actor.visible, second)
            sounding[second, column] = on(actor.sounding, second)
    return visible, sounding
