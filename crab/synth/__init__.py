"""AV-Shapes: clips made by us, whose every label is exact.

make_scene -> render_frame, render_audio -> write_clip      what is in the files
make_scene -> index_map -> write_maps                        which pixels show which class
make_scene -> samples_of                                     what is asked about them: nine tasks
make_scene -> transcript, targets                            what is there, second by second, without files
"""

from crab.synth.dataset import synthesise
from crab.synth.evidence import targets, transcript
from crab.synth.index_maps import CLASS_NUMBERS, index_map
from crab.synth.make import make_scene
from crab.synth.questions import samples_of
from crab.synth.render import render_frame, shape_mask
from crab.synth.scene import CLASS_NAMES, Actor, Scene
from crab.synth.sound import render_audio, render_mono

__all__ = [
    "CLASS_NAMES",
    "CLASS_NUMBERS",
    "Actor",
    "Scene",
    "index_map",
    "make_scene",
    "render_audio",
    "render_frame",
    "render_mono",
    "samples_of",
    "shape_mask",
    "synthesise",
    "targets",
    "transcript",
]
