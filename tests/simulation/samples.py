"""The few clips of a history, made once: clip n, computed by an encoder that gave variant v."""

from __future__ import annotations

from typing import Any

import numpy as np
from cache_samples import key

from crab_platform.packs import NewEntry, new_entry

CLIPS = 5
VARIANTS = 2

KEYS = [key(number, "float32").digest for number in range(CLIPS)]
_NUMBER = {name: number for number, name in enumerate(KEYS)}
ENTRIES: list[list[NewEntry]] = [
    [
        new_entry(
            key(number, "float32"),
            {"x": np.array([number, variant, 1.5], np.float32)},
            source_url=f"file:///media/{number}.mp4",
            source_version="1-1",
        )
        for variant in range(VARIANTS)
    ]
    for number in range(CLIPS)
]


def number_of(key: str) -> int:
    """The clip of a key."""
    return _NUMBER[key]


def is_true(key: str, arrays: dict[str, Any]) -> bool:
    """Whether these are features that some encoder gave for this key."""
    found = arrays["x"].tolist()
    return bool(found[0] == number_of(key) and found[2] == 1.5 and 0 <= found[1] < VARIANTS)
