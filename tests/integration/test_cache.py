"""The feature cache on a folder and on a real S3 server, when nothing goes wrong."""

from __future__ import annotations

import json
import pickle
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import entry, equal_to_stored, key
from safetensors import safe_open
from servers.fault_proxy import fault_proxy
from servers.seaweedfs import S3Server

from crab_platform.cache import FeatureCache
from crab_platform.identity import digest
from crab_platform.packs import new_entry
from crab_platform.storage import Store, open_store


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_come_back_bit_for_bit(store: Store, dtype: str) -> None:
    cache = FeatureCache(store)
    placed = cache.commit([entry(number, dtype) for number in range(5)])
    index = FeatureCache(open_store(store.url)).index()
    keys = [key(number, dtype).digest for number in (3, 0, 4, 1, 2, 3)]
    found = index.lookup([*keys, key(99).digest])
    assert found == {one.key: one for one in placed}
    for number, arrays in zip(
        (3, 0, 4, 1, 2, 3), cache.read([found[k] for k in keys]), strict=True
    ):
        assert equal_to_stored(arrays, number, dtype)
        with pytest.raises(ValueError, match="read-only"):  # 3 was asked for twice
            arrays["layer_1"][:] = 0


def test_bfloat16_rounds_to_nearest_even_and_comes_back_as_float32(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.concatenate(
        [
            np.random.default_rng(1).standard_normal(5000) * 10.0 ** np.arange(-20, 30).repeat(100),
            [0.0, -0.0, 1.00390625, 1.01171875, 65504, 3.3e38, 1e-40],
        ]
    ).astype(np.float32)
    cache = FeatureCache(open_store(tmp_path))
    (placed,) = cache.commit([new_entry(key(1, "bfloat16"), {"x": values})])
    (arrays,) = cache.read([placed])
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    assert arrays["x"].dtype == np.float32
    assert arrays["x"].tobytes() == expected.tobytes()
    assert placed.length == 2 * values.size


def test_a_pack_is_plain_safetensors(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    (placed, _) = cache.commit([entry(1), entry(2)])
    with safe_open(tmp_path / placed.pack, framework="numpy") as file:
        assert set(file.keys()) == {
            f"{key(n).digest}/{name}" for n in (1, 2) for name in ("layer_1", "layer_2")
        }
        arrays = {n: file.get_tensor(f"{placed.key}/{n}") for n in ("layer_1", "layer_2")}
        noted = json.loads(file.metadata()[placed.key])
    assert equal_to_stored(arrays, 1)
    assert digest(noted["record"]) == placed.key
    assert noted["blake3"] == placed.blake3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dtype: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"'x': 1 of 2 values are not finite"):
        new_entry(key(1, dtype), {"x": np.array([1.0, value])})


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_values_that_overflow_the_stored_type_are_refused(dtype: str, value: float) -> None:
    with pytest.raises(ValueError, match=dtype):
        new_entry(key(1, dtype), {"x": np.array([value], np.float32)})


@pytest.mark.parametrize("arrays", [{}, {"a/b": np.ones(1)}, {"x": np.ones(1, np.int64)}])
def test_unusable_arrays_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="feature"):
        new_entry(key(1), arrays)


def test_scalars_and_empty_arrays_are_kept(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    arrays = {"empty": np.zeros((0, 4), np.float16), "one": np.float16(2.5).reshape(())}
    (found,) = cache.read(cache.commit([new_entry(key(1), arrays)]))
    assert found["empty"].shape == (0, 4)
    assert found["one"].shape == ()
    assert found["one"] == 2.5


def test_packs_are_split_by_size(tmp_path: Path) -> None:
    entries = [entry(number) for number in range(6)]
    limit = 2 * max(one.nbytes for one in entries)
    cache = FeatureCache(open_store(tmp_path), pack_bytes=limit)
    placed = cache.commit(entries)
    assert [one.key for one in placed] == [one.key for one in entries]
    packs = {one.pack for one in placed}
    assert len(packs) >= 3
    for pack in packs:
        assert sum(one.length for one in placed if one.pack == pack) <= limit
    assert len(FeatureCache(open_store(tmp_path), pack_bytes=1).commit(entries[:2])) == 2
    for number, arrays in enumerate(cache.read(placed)):
        assert equal_to_stored(arrays, number)


def test_same_media_at_two_urls_is_stored_once_and_known_at_both(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    twin = replace(entry(1), source_url="s3://elsewhere/1.mp4", source_version="etag")
    one, other = cache.commit([entry(1), twin])
    assert one == other
    index = cache.index()
    assert len(index) == 1
    assert index.duplicates == 0
    for url, version in (("s3://elsewhere/1.mp4", "etag"), ("file:///media/1.mp4", "1-1")):
        assert index.known_media([(url, version)]) == [key(1).media_sha256]
    assert index.known_media([("file:///media/1.mp4", "changed")]) == [None]
    assert index.known_media([("", ""), ("file:///media/1.mp4", None)]) == [None, None]


def test_media_that_commits_disagree_on_is_not_known(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    cache.commit([entry(1)])
    cache.commit([replace(entry(2), source_url="file:///media/1.mp4", source_version="1-1")])
    assert cache.index().known_media([("file:///media/1.mp4", "1-1")]) == [None]


def test_one_key_with_two_features_in_one_commit_is_refused(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    with pytest.raises(ValueError, match="different features"):
        cache.commit([entry(1), replace(entry(1), arrays=entry(2).arrays)])
    assert cache.store.list() == []


def test_of_two_commits_of_a_key_all_readers_see_the_first(store: Store) -> None:
    first = FeatureCache(store).commit([entry(1), entry(2)])
    FeatureCache(store).commit([entry(2), entry(3)])
    FeatureCache(store).commit([replace(entry(1), arrays=entry(9).arrays)])  # not deterministic
    index = FeatureCache(store).index()
    assert len(index) == 3
    assert sorted(index) == sorted(key(n).digest for n in (1, 2, 3))
    found = index.lookup(key(n).digest for n in (1, 2))
    assert [found[one.key] for one in first] == first
    assert index.duplicates == 2
    assert index.conflicts == [key(1).digest]


def test_lookups_and_reads_make_few_requests(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.url(f"requests/{secrets.token_hex(6)}")
    numbers = range(60)
    for start in range(0, 60, 20):
        FeatureCache(open_store(url)).commit([entry(n) for n in numbers[start : start + 20]])
    seen: list[tuple[str, str]] = []

    def note(method: str, path: str) -> str:
        seen.append((method, path))
        return "pass"

    with fault_proxy(s3.endpoint, note) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        cache = FeatureCache(open_store(url))
        index = cache.index()
        assert len(seen) == 3 + 3  # LIST of commits, quarantine and snapshots; three commits
        found = index.lookup(key(n).digest for n in range(100))
        assert len(found) == 60
        assert index.known_media([("file:///media/7.mp4", "7-1")]) == [key(7).media_sha256]
        assert len(seen) == 6  # nothing more
        cache.read([found[key(n).digest] for n in reversed(numbers)])
        assert len(seen) == 6 + 3  # one range a pack
    assert {method for method, _ in seen} == {"GET"}


def test_a_cache_can_be_sent_to_a_worker(store: Store) -> None:
    cache = pickle.loads(pickle.dumps(FeatureCache(store, pack_bytes=1000)))
    (placed,) = cache.commit([entry(1)])
    assert equal_to_stored(FeatureCache(store).read([placed])[0], 1)
    assert cache.pack_bytes == 1000
