"""Index maps: one small PNG a frame in which every pixel is the number of the class that it shows.

A mask is one or more of these numbers (MaskRef.values), so one map serves every mask of its frame.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crab.masks import MASK_SIZE
from crab.synth.render import shape_mask
from crab.synth.scene import CLASS_NAMES, Scene

CLASS_NUMBERS = {name: number for number, name in enumerate(CLASS_NAMES, start=1)}
"0 is the background"


def map_folder(scene: Scene) -> str:
    """Where the clip's maps lie, relative to the samples file."""
    return f"masks/{scene.clip}"


def map_path(scene: Scene, frame: int) -> str:
    return f"{map_folder(scene)}/{frame}.png"


def index_map(scene: Scene, second: int, size: int = MASK_SIZE) -> NDArray[np.uint8]:
    """[size, size] class numbers at t = `second`, whatever the size of the clip.

    A pixel belongs to the shape that its centre lies in.
    """
    pixels = np.zeros((size, size), dtype=np.uint8)
    for actor in scene.seen:
        pixels[shape_mask(scene, actor, second, size)] = CLASS_NUMBERS[actor.name]
    return pixels


def write_maps(scene: Scene, folder: Path) -> None:
    """Write `folder`/0.png ... 9.png, all or none: a folder of another name first, then a rename."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        for second in range(scene.duration_s):
            Image.fromarray(index_map(scene, second)).save(
                temporary / f"{second}.png", optimize=True
            )
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was faster: its maps are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
