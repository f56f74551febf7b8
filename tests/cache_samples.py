"""Features to put into a cache in tests: a function of a number, so that they can be checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from crab_platform.catalog import ManifestRow
from crab_platform.identity import FeatureKey
from crab_platform.packs import Entry, NewEntry, new_entry

Damage = Callable[[str, Callable[[bytes], bytes]], None]
"""(path in the store, what to do to its bytes): changes a file behind the store's back."""


def key(number: int, dtype: str = "float16", stream: str = "video") -> FeatureKey:
    return FeatureKey(
        media_sha256=f"{number:064x}",
        stream=stream,
        sampling={"num_frames": 3},
        decode={"version": 1},
        encoder={"name": "test", "weights_sha256": "00" * 32},
        dtype=dtype,
    )


def features(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    return {
        "layer_2": rng.standard_normal((3, 5, 8)).astype(np.float32),
        "layer_1": rng.standard_normal((3, 4 + number % 3, 8)).astype(np.float32),
    }


def entry(number: int, dtype: str = "float16") -> NewEntry:
    return new_entry(
        key(number, dtype),
        features(number),
        source_url=f"file:///media/{number}.mp4",
        source_version=f"{number}-1",
    )


def equal_to_stored(found: dict[str, np.ndarray], number: int, dtype: str = "float16") -> bool:
    expected = {name: array.astype(dtype) for name, array in features(number).items()}
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype
        and found[name].shape == expected[name].shape
        and found[name].tobytes() == expected[name].tobytes()
        for name in expected
    )


def rows(entries: Iterable[Entry]) -> list[ManifestRow]:
    """Rows of a manifest: clip-0 of `key(0)`, and so on."""
    return [
        ManifestRow(
            source=f"clip-{number}",
            stream="video",
            status="ready",
            media_sha256=key(number).media_sha256,
            entry=one,
        )
        for number, one in enumerate(entries)
    ]
