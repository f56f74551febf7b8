"""Clips that cost next to nothing to decode, each with other bytes: a second of coloured pictures and a tone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.media_files import tone, write_clip

SIDE = 64
FRAMES = 4

SAMPLING = {"num_frames": 2, "num_segments": 1}
"""Of a preprocess spec: as little as there is in such a clip."""


def make_clips(folder: Path, count: int) -> Path:
    """`count` files of about 40 kB; returns their folder. About 100 a second."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        colours = rng.integers(0, 256, (FRAMES, 2, 2, 3), dtype=np.uint8)
        write_clip(
            folder / f"{number:04d}.mkv",
            pictures=[picture.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1) for picture in colours],
            times_ms=[250 * n for n in range(FRAMES)],
            samples=tone([200.0 + number]),
            options={"preset": "ultrafast"},
        )
    return folder
