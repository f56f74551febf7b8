"""Stored types and codecs: what readers get back, what is lost, and what damage does."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load

from crab_platform import codec
from crab_platform.commits import specs_from_json, specs_to_json
from crab_platform.identity import CODECS, DTYPES, AnyKey, DecodedKey, FeatureKey, canonical_json
from crab_platform.packs import (
    TOLERANCE,
    CorruptEntry,
    Entry,
    build_pack,
    new_entry,
    open_entry,
    relative_l2,
    tolerance_of,
)

BLOSC2 = "blosc2-shuffle-zstd1"
Array = np.ndarray[Any, Any]


def key(dtype: str = "float16", way: str = "raw", number: int = 1) -> FeatureKey:
    return FeatureKey(
        media_sha256=f"{number:064x}",
        stream="video",
        sampling={"num_frames": 3},
        decode={"version": 1},
        encoder={"name": "test"},
        dtype=dtype,
        codec=way,
    )


def decoded_key(way: str = "raw") -> DecodedKey:
    return DecodedKey(
        media_sha256="ab" * 32, stream="video", sampling={}, decode={"version": 1}, codec=way
    )


def pack(key: AnyKey, arrays: dict[str, Array]) -> tuple[bytes, Entry]:
    """A pack of one entry. Its place has been through JSON, as it is in commits and manifests."""
    data, (placed,) = build_pack("packs/x", [new_entry(key, arrays)])
    return data, replace(placed, tensors=specs_from_json(specs_to_json(placed.tensors)))


def body(data: bytes, entry: Entry) -> bytearray:
    return bytearray(data[entry.offset : entry.offset + entry.length])


def round_trip(key: AnyKey, arrays: dict[str, Array]) -> dict[str, Array]:
    data, entry = pack(key, arrays)
    return open_entry(entry, body(data, entry))


def hostile(entry: Entry, data: bytearray) -> Entry:
    """The entry with the digest that these bytes have: what a writer who means ill would commit."""
    shapes = [
        [s.name, s.dtype, list(s.shape)]
        + ([] if s.stored_bytes is None else [s.codec, s.stored_bytes])
        for s in entry.tensors
    ]
    text = canonical_json({"key": entry.key, "tensors": shapes})
    return replace(entry, length=len(data), blake3=blake3(text + bytes(data)).hexdigest())


WAYS = st.sampled_from(CODECS)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9)
FINITE = hnp.arrays(
    np.float32, SHAPES, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@given(FINITE, WAYS)
def test_float32_comes_back_bit_by_bit(values: Array, way: str) -> None:
    found = round_trip(key("float32", way), {"x": values})["x"]
    assert found.dtype == np.float32
    assert found.shape == values.shape
    assert found.tobytes() == values.tobytes()


@given(
    hnp.arrays(
        np.float16, SHAPES, elements=st.floats(width=16, allow_nan=False).filter(np.isfinite)
    ),
    WAYS,
)
def test_float16_comes_back_bit_by_bit(values: Array, way: str) -> None:
    found = round_trip(key("float16", way), {"x": values.astype(np.float32)})["x"]
    assert found.dtype == np.float16
    assert found.tobytes() == values.tobytes()


@given(FINITE.filter(lambda values: np.all(np.abs(values) < 3.3e38)), WAYS)
def test_bfloat16_comes_back_as_float32_within_half_a_step(values: Array, way: str) -> None:
    found = round_trip(key("bfloat16", way), {"x": values})["x"]
    assert found.dtype == np.float32
    assert np.all(np.abs(found - values) <= np.maximum(np.abs(values) * 2.0**-8, 1e-40))


@given(FINITE, WAYS)
def test_int8_is_off_by_half_a_scale_of_its_token_at_most(values: Array, way: str) -> None:
    found = round_trip(key("int8", way), {"x": values})["x"]
    assert found.dtype == np.float32
    assert found.shape == values.shape
    assert np.isfinite(found).all()
    exact = values.astype(np.float64)
    scale = np.abs(exact).max(axis=-1, keepdims=True, initial=0) / 127
    # The scale is a float32 and never under the smallest normal one.
    bound = np.maximum(scale, np.finfo(np.float32).tiny) * 0.50001
    assert np.all(np.abs(found - exact) <= bound)


def test_int8_keeps_a_scale_for_every_token_that_readers_do_not_see() -> None:
    values = np.array([[[1, -2, 4], [0, 0, 0]], [[1e-6, 0, 0], [3e38, 1e38, 1]]], np.float32)
    data, entry = pack(key("int8"), {"x": values})
    assert [(s.name, s.dtype, s.shape) for s in entry.tensors] == [
        ("x", "int8", (2, 2, 3)),
        ("x.scale", "float32", (2, 2)),
    ]
    found = open_entry(entry, body(data, entry))
    assert list(found) == ["x"]
    np.testing.assert_array_equal(found["x"][0, 1], [0, 0, 0])
    np.testing.assert_allclose(found["x"][..., 0], values[..., 0], rtol=0.1)
    stored = load(data)
    assert stored[f"{entry.key}/x"].dtype == np.int8
    assert stored[f"{entry.key}/x"][0, 0].tolist() == [32, -64, 127]


def test_int8_refuses_a_name_that_is_taken_by_scales_and_single_numbers() -> None:
    one = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"x\.scale"):
        new_entry(key("int8"), {"x": one, "x.scale": one})
    with pytest.raises(ValueError, match="single number"):
        new_entry(key("int8"), {"x": np.array(1.0)})
    # Elsewhere it is a name as any other.
    assert list(round_trip(key("float32"), {"x": one, "x.scale": one})) == ["x", "x.scale"]
    assert list(round_trip(key("int8"), {"x.scale": one})) == ["x.scale"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_values_that_no_type_can_hold_are_refused(dtype: str, value: float) -> None:
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        new_entry(key(dtype), {"x": np.array([1.0, value])})


@pytest.mark.parametrize("way", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)])
def test_arrays_without_tokens_or_features_keep_their_shape(
    dtype: str, way: str, shape: tuple[int, ...]
) -> None:
    found = round_trip(key(dtype, way), {"x": np.zeros(shape, np.float32), "y": np.ones((2, 2))})
    assert found["x"].shape == shape
    np.testing.assert_array_equal(found["y"], np.ones((2, 2)))


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=7)),
    FINITE,
    WAYS,
)
def test_decoded_windows_come_back_as_they_were(frames: Array, sound: Array, way: str) -> None:
    found = round_trip(decoded_key(way), {"frames": frames, "sound": sound})
    for name, given_ in (("frames", frames), ("sound", sound)):
        assert found[name].dtype == given_.dtype
        assert found[name].shape == given_.shape
        assert found[name].tobytes() == given_.tobytes()


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int16, np.int8, ">f4", bool])
def test_decoded_windows_of_other_types_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="expected uint8 frames or float32 sound"):
        new_entry(decoded_key(), {"x": np.ones(3, kind)})


def test_decoded_sound_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are not finite"):
        new_entry(decoded_key(), {"x": np.array([0, np.nan], np.float32)})


def smooth(shape: tuple[int, ...] = (10, 50, 64)) -> Array:
    """Numbers that compress, as features do: neighbours have similar sizes."""
    noise = np.random.default_rng(1).standard_normal(shape)
    return (noise * 0.1 + 1).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_codec_changes_bytes_and_digest_but_no_value(dtype: str) -> None:
    arrays = {"x": smooth(), "y": np.zeros((4, 7))}
    (raw_data, raw), (data, small) = (pack(key(dtype, way), arrays) for way in CODECS)
    assert small.length < 0.95 * raw.length
    assert small.blake3 != raw.blake3
    one, other = open_entry(raw, body(raw_data, raw)), open_entry(small, body(data, small))
    assert relative_l2(one, other) == 0
    assert pack(key(dtype, BLOSC2), arrays)[0] == data  # the same bytes when made again


@pytest.mark.parametrize("way", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_are_safetensors_files_that_any_tool_opens(dtype: str, way: str) -> None:
    data, entry = pack(key(dtype, way), {"x": smooth()})
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    about = json.loads(header["__metadata__"][entry.key])
    assert about["blake3"] == entry.blake3
    assert about["record"] == key(dtype, way).record()
    if dtype == "bfloat16" and way == "raw":
        return  # numpy has none: safetensors opens it in torch
    stored = load(data)
    assert set(stored) == {f"{entry.key}/{spec.name}" for spec in entry.tensors}
    for spec in entry.tensors:
        tensor = stored[f"{entry.key}/{spec.name}"]
        if way == "raw":
            assert tensor.shape == spec.shape
        else:
            assert tensor.dtype == np.uint8
            assert tensor.shape == (spec.stored_bytes,)
            said = about["tensors"][spec.name]
            assert said == {"dtype": spec.dtype, "shape": list(spec.shape), "codec": way}


def test_specs_of_raw_tensors_are_written_as_before_there_were_codecs() -> None:
    _, entry = pack(key("float16"), {"x": np.ones((2, 3))})
    assert specs_to_json(entry.tensors) == '[["x","float16",[2,3],0]]'
    _, entry = pack(key("float16", BLOSC2), {"x": np.ones((2, 3))})
    (spec,) = entry.tensors
    assert specs_to_json(entry.tensors) == (
        f'[["x","float16",[2,3],0,"{BLOSC2}",{spec.stored_bytes}]]'
    )


@pytest.mark.parametrize(
    "text", ['[["x","float16",[2],0,"raw"]]', '[["x","float16",[2],0,"raw",1,2]]', "[[1]]", "{"]
)
def test_specs_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="tensor list"):
        specs_from_json(text)


@settings(max_examples=300)
@given(st.data())
def test_damaged_compressed_bytes_are_a_corrupt_entry(data: st.DataObject) -> None:
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 8)), "y": smooth((3,))})
    there = body(stored, entry)
    at = data.draw(st.integers(0, len(there) - 1))
    there[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptEntry, match="BLAKE3"):
        open_entry(entry, there)


@settings(max_examples=500)
@given(st.data())
def test_committed_nonsense_is_a_corrupt_entry_or_an_array_and_never_a_crash(
    data: st.DataObject,
) -> None:
    """A writer who knows the format can make any bytes match their digest."""
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 80))})
    there = body(stored, entry)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 31) | st.integers(0, len(there) - 1))
        there[at] = data.draw(st.integers(0, 255))
    try:
        found = open_entry(hostile(entry, there), there)
    except CorruptEntry:
        return
    assert found["x"].shape == (2, 9, 80)


def test_a_chunk_that_promises_more_than_the_shape_is_refused_before_memory_is_taken() -> None:
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 8))})
    there = body(stored, entry)
    for size in (2**31 - 33, 0, -1, 2 * 9 * 8 * 2 + 2, 2 * 9 * 8 * 2 - 2):
        struct.pack_into("<i", there, 4, size)
        with pytest.raises(CorruptEntry, match="says that it becomes"):
            open_entry(hostile(entry, there), there)
    # A shape that is larger than the bytes can be, for which there is no memory either.
    whole = body(stored, entry)
    (spec,) = entry.tensors
    huge = replace(entry, tensors=(replace(spec, shape=(2**40, 2**20)),))
    with pytest.raises(CorruptEntry, match="says that it becomes"):
        open_entry(hostile(huge, whole), whole)


@pytest.mark.parametrize("byte", [0, 1, 2, 3, 16, 21, 22, 23, 24, 30, 31])
def test_a_chunk_of_another_kind_never_reaches_blosc2(byte: int) -> None:
    """Filters and codecs that it does not know are plugins, which it would look for and load."""
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 80))})
    there = body(stored, entry)
    there[byte] ^= 0xA0
    with pytest.raises(CorruptEntry, match="not shuffled and zstd of our kind"):
        open_entry(hostile(entry, there), there)


@pytest.mark.parametrize("change", ["more", "less", "twice", "nothing", "length"])
def test_chunks_that_do_not_add_up_are_refused(change: str) -> None:
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 80))})
    there = body(stored, entry)
    if change == "more":
        there += bytes(5)
    elif change == "less":
        there = there[:-1]
    elif change == "twice":
        there = there + there
    elif change == "nothing":
        there = bytearray()
    else:
        struct.pack_into("<i", there, 12, 2**31 - 1)
    (spec,) = entry.tensors
    entry = replace(entry, tensors=(replace(spec, stored_bytes=len(there)),))
    with pytest.raises(CorruptEntry, match="byte"):
        open_entry(hostile(entry, there), there)


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "zip"},
        {"codec": "raw"},
        {"stored_bytes": None},
        {"stored_bytes": -1},
        {"dtype": "float64"},
        {"shape": (-1, 5)},
        {"shape": (2**32, 2**32)},
        {"offset": 3},
    ],
    ids=str,
)
def test_tensor_specs_that_contradict_the_bytes_are_a_corrupt_entry(change: dict[str, Any]) -> None:
    stored, entry = pack(key("float16", BLOSC2), {"x": smooth((2, 9, 8))})
    (spec,) = entry.tensors
    there = body(stored, entry)
    entry = replace(entry, tensors=(replace(spec, **change),))
    with pytest.raises(CorruptEntry):
        open_entry(hostile(entry, there) if "dtype" not in change else entry, there)


def test_a_raw_shape_beyond_64_bits_is_a_corrupt_entry() -> None:
    _, entry = pack(key("float16"), {"x": np.zeros((0, 4))})
    (spec,) = entry.tensors
    entry = replace(entry, tensors=(replace(spec, shape=(2**32, 2**32)),))
    with pytest.raises(CorruptEntry, match="shapes need"):
        open_entry(hostile(entry, bytearray()), bytearray())


@pytest.mark.parametrize("change", [{"shape": (3,)}, {"name": "y.scale"}], ids=str)
def test_int8_without_scales_that_fit_is_a_corrupt_entry(change: dict[str, Any]) -> None:
    stored, entry = pack(key("int8"), {"x": smooth((3, 2))})
    there = body(stored, entry)
    numbers, scale = entry.tensors
    entry = replace(entry, tensors=(replace(numbers, shape=(2, 3)), replace(scale, **change)))
    with pytest.raises(CorruptEntry, match="scales of int8 tensor 'x'"):
        open_entry(hostile(entry, there), there)


def test_tensors_larger_than_a_chunk_are_several_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "CHUNK", 1 << 10)
    values = smooth((3, 9, 80))
    data, entry = pack(key("float32", BLOSC2), {"x": values})
    np.testing.assert_array_equal(open_entry(entry, body(data, entry))["x"], values)
    assert bytes(body(data, entry)).count(bytes([5, 1, 0x85, 4])) > 1


def test_what_an_entry_cost_and_how_exact_it_is_travel_with_it() -> None:
    new = new_entry(
        key(), {"x": np.ones(3)}, decode_s=1.5, encode_s=0.25, device="cuda", tolerance=5e-4
    )
    assert (new.decode_s, new.encode_s, new.device, new.tolerance) == (1.5, 0.25, "cuda", 5e-4)
    plain = new_entry(key(), {"x": np.ones(3)})
    assert (plain.decode_s, plain.encode_s, plain.device, plain.tolerance) == (0, 0, "", 0)


def test_relative_l2_is_the_largest_of_all_arrays() -> None:
    one = {"x": np.array([3.0, 4.0]), "y": np.array([[2.0]], np.float16)}
    assert relative_l2(one, one) == 0
    other = one | {"x": np.array([3.0, 4.5])}
    assert relative_l2(one, other) == pytest.approx(0.1)
    assert relative_l2(one, other | {"y": np.array([[3.0]])}) == pytest.approx(0.5)
    assert relative_l2({}, {}) == 0
    assert relative_l2({"x": np.zeros(3)}, {"x": np.zeros(3)}) == 0
    assert relative_l2({"x": np.zeros((0, 3))}, {"x": np.zeros((0, 3))}) == 0


@pytest.mark.parametrize(
    "other",
    [{}, {"y": np.zeros(2)}, {"x": np.zeros(3)}, {"x": np.ones(2)}, {"x": np.array([0, np.nan])}],
    ids=["no array", "other name", "other shape", "zeros changed", "not finite"],
)
def test_what_cannot_be_compared_is_infinitely_far(other: dict[str, Array]) -> None:
    assert relative_l2({"x": np.zeros(2)}, other) == float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_covers_noise_of_float32_and_finds_arithmetic_in_bfloat16(dtype: str) -> None:
    rng = np.random.default_rng(5)
    values = rng.standard_normal((20, 50, 96)).astype(np.float32)
    values[:, :, 7] *= 20  # an outlier feature, as transformers have
    noisy = values * (1 + 1e-5 * rng.standard_normal(values.shape)).astype(np.float32)
    coarse = values * (1 + 1e-2 * rng.standard_normal(values.shape)).astype(np.float32)
    stored, near, far = (round_trip(key(dtype), {"x": x}) for x in (values, noisy, coarse))
    assert relative_l2(stored, near) < TOLERANCE[dtype] < relative_l2(stored, far)
    assert tolerance_of(dtype) == TOLERANCE[dtype]
    assert tolerance_of(dtype, "bfloat16") > relative_l2(stored, far)


def test_reading_shares_memory_where_nothing_was_lost() -> None:
    data, entry = pack(key("float16"), {"x": smooth()})
    buffer = body(data, entry)
    found = open_entry(entry, buffer)["x"]
    assert np.shares_memory(found, np.frombuffer(buffer, np.uint8))
    assert not found.flags.writeable
