"""Pictures of a scene: numpy only, one small box a shape, so a frame costs a fraction of its encoding.

Shapes are signed distances; the picture softens their edge over one pixel and `shape_mask` cuts at zero, so the mask is
exact at every size.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

from crab.synth.scene import Actor, Scene, on

RGB = {
    "red": (222, 48, 44),
    "green": (44, 176, 72),
    "blue": (52, 92, 226),
    "yellow": (236, 208, 52),
}


def render_frame(scene: Scene, t_s: float, size: int = 224) -> NDArray[np.uint8]:
    """RGB picture uint8 [size, size, 3] at time `t_s` in seconds, 0 <= t_s < duration."""
    second = _second(scene, t_s)
    frame = _background(scene.background, size).copy()
    for actor in scene.actors:
        if not on(actor.visible, second):
            continue
        rows, columns, distance = _distance(actor, t_s, size)
        cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        box = frame[rows, columns]
        colour = np.asarray(RGB[actor.colour], dtype=np.float32)
        frame[rows, columns] = np.rint(box + cover * (colour - box)).astype(np.uint8)
    return frame


def shape_mask(scene: Scene, actor: Actor, t_s: float, size: int = 224) -> NDArray[np.bool_]:
    """Pixels [size, size] whose centre lies in the actor's shape at `t_s`; empty where it is not seen."""
    mask = np.zeros((size, size), dtype=bool)
    if on(actor.visible, _second(scene, t_s)):
        rows, columns, distance = _distance(actor, t_s, size)
        mask[rows, columns] = distance <= 0
    return mask


def _second(scene: Scene, t_s: float) -> int:
    if not 0 <= t_s < scene.duration_s:
        raise ValueError(
            f"time {t_s} s given, the scene lasts from 0 to {scene.duration_s} s (end not included)"
        )
    return int(t_s)


@functools.lru_cache(maxsize=8)
def _background(levels: tuple[int, int, int], size: int) -> NDArray[np.uint8]:
    heights = np.linspace(0.0, 1.0, size)
    column = np.rint(np.interp(heights, (0.0, 0.5, 1.0), levels)).astype(np.uint8)
    return np.broadcast_to(column[:, None, None], (size, size, 3)).copy()


def _distance(actor: Actor, t_s: float, size: int) -> tuple[slice, slice, NDArray[np.float32]]:
    """Rows and columns of the box around the shape, and the signed distance to its edge in pixels there."""
    x, y = (size * part for part in actor.centre(t_s))
    radius = size * actor.radius
    rows = slice(max(0, math.floor(y - radius) - 1), min(size, math.ceil(y + radius) + 1))
    columns = slice(max(0, math.floor(x - radius) - 1), min(size, math.ceil(x + radius) + 1))
    # A pixel is judged by its centre.
    dy = (np.arange(rows.start, rows.stop, dtype=np.float32) + np.float32(0.5 - y))[:, None]
    dx = (np.arange(columns.start, columns.stop, dtype=np.float32) + np.float32(0.5 - x))[None, :]
    if actor.shape == "circle":
        return rows, columns, np.hypot(dx, dy) - radius
    if actor.shape == "square":
        # The side is 1.7 radii: about the circle's area, so size tells nothing of the class.
        return rows, columns, np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * radius
    # Upright triangle with its corners on the circle: two slanted sides and a floor at half the radius.
    slant = np.abs(dx) * math.cos(math.pi / 6) - dy * math.sin(math.pi / 6)
    return rows, columns, np.maximum(slant, dy) - 0.5 * radius
