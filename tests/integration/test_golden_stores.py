"""Stores that released versions wrote are read for ever; what a future version wrote is never misread (A14)."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import CorruptManifest, read_manifest
from crab_platform.identity import FeatureKey
from crab_platform.manifest_reader import ManifestReader
from crab_platform.storage import open_store

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

# Schema 1 as of 2026-11-23 (commit 3618d2e); schema 2 as of issue 4. Both hold the same three clips.
MANIFESTS = {
    "schema-1": "4ee7f09cfe9230e1fb09130f0e92082ce81a27fb26323c561031ffb33fc3e8a0",
    "schema-2": "4ee7f09cfe9230e1fb09130f0e92082ce81a27fb26323c561031ffb33fc3e8a0",
}


def key(number: int, dtype: str) -> FeatureKey:
    return FeatureKey(
        media_sha256=f"{number:064x}",
        stream="video",
        sampling={"num_frames": 3},
        decode={"version": 1},
        encoder={"name": "golden", "weights_sha256": "00" * 32},
        dtype=dtype,
    )


def features(number: int) -> dict[str, np.ndarray]:
    """All values are exact in every stored type."""
    return {
        "layer_1": (np.arange(12, dtype=np.float32).reshape(3, 4) + number) / 8,
        "layer_2": np.full((2,), number / 4, np.float32),
    }


@pytest.fixture(params=sorted(MANIFESTS))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, FeatureCache]:
    shutil.copytree(GOLDEN / request.param, tmp_path / "store")
    return request.param, FeatureCache(open_store(tmp_path / "store"))


def test_every_entry_of_a_released_version_is_found_and_right(
    golden: tuple[str, FeatureCache],
) -> None:
    _, cache = golden
    index = cache.index()
    keys = [
        key(n, dtype).digest for n, dtype in enumerate(("float16", "bfloat16", "float32"), start=1)
    ]
    found = index.lookup(keys)
    assert list(found) == keys
    assert index.skipped == {}
    for number, arrays in enumerate(cache.read(list(found.values())), start=1):
        for name, expected in features(number).items():
            assert np.array_equal(arrays[name].astype(np.float32), expected)
    assert index.known_media([("file:///media/2.mp4", "2-1")]) == [f"{2:064x}"]


def test_a_manifest_of_a_released_version_keeps_its_digest(
    golden: tuple[str, FeatureCache],
) -> None:
    name, cache = golden
    manifest = read_manifest(cache.store, MANIFESTS[name])
    assert [(row.source, row.status, row.reason) for row in manifest.rows] == [
        ("clip-1", "ready", ""),
        ("clip-2", "ready", ""),
        ("clip-3", "ready", ""),
        ("clip-4", "set_aside", "not_found"),
    ]
    pairs = [(f"clip-{n}", "video") for n in (1, 2, 3)]
    for number, arrays in enumerate(ManifestReader(cache, manifest).read(pairs), start=1):
        assert np.array_equal(arrays["layer_2"].astype(np.float32), features(number)["layer_2"])


def newer(data: bytes, extra: bool) -> bytes:
    """The file as a version after ours would write it: its number is higher, and perhaps all columns are others."""
    table = pq.read_table(io.BytesIO(data))
    version = table.column("schema")[0].as_py() + 100
    schema = pa.array([version] * table.num_rows, pa.int32())
    columns: dict[str, Any] = {"schema": schema, "unheard_of": ["x"] * table.num_rows}
    if not extra:
        columns = {name: table.column(name) for name in table.column_names} | {"schema": schema}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize("extra", [False, True], ids=["same columns", "other columns"])
def test_what_a_future_version_wrote_is_a_miss_with_its_reason(
    golden: tuple[str, FeatureCache], extra: bool
) -> None:
    name, cache = golden
    root = Path(cache.store.url)
    for path in (root / "commits").iterdir():
        path.write_bytes(newer(path.read_bytes(), extra))
    index = cache.index()
    assert len(index) == 0
    assert index.skipped == {"schema_newer": 3}
    manifest = root / "manifests" / f"{MANIFESTS[name]}.parquet"
    manifest.write_bytes(newer(manifest.read_bytes(), extra=False))
    with pytest.raises(CorruptManifest, match="schema"):
        read_manifest(cache.store, MANIFESTS[name])


def test_a_reader_that_does_not_look_at_the_version_would_misread(
    golden: tuple[str, FeatureCache],
) -> None:
    """The planted bug: the same check, by a reader that takes every file for one of its own version."""
    _, cache = golden
    for path in (Path(cache.store.url) / "commits").iterdir():
        data = newer(path.read_bytes(), extra=False)
        careless = pq.read_table(io.BytesIO(data), columns=["key"])
        assert careless.num_rows == 1
        with pytest.raises(commits.UnusableCommit, match="schema_newer"):
            commits.read_commit(data)
