"""Keys: golden ones never change, every declared field changes them, nothing unstable enters."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab_platform.identity import (
    ABSENT,
    DecodedKey,
    FeatureKey,
    canonical_json,
    differing_fields,
    digest,
    sha256_file,
    sha256_hex,
)

FIELDS: dict[str, Any] = {
    "media_sha256": "ab" * 32,
    "stream": "video",
    "sampling": {"rule": "uniform", "num_frames": 10, "size": 224},
    "decode": {"backend": "decord", "version": 1},
    "encoder": {"name": "clip", "weights_sha256": "cd" * 32, "layers": [14, 22, 23], "version": 1},
    "dtype": "float16",
}

# Computed once and written down. If one of these fails, every feature that anybody has stored is
# lost to lookups: bump KEY_SCHEMA on purpose, or undo the change.
GOLDEN_VIDEO = "4b2da07248c8401fdcac3eaab2174ddbeb495429e9604ea41948fcd3f4006a61"
GOLDEN_AUDIO = "12128f6242d02dce3395eef7e87b408ad017b96e1b017f608e88d58dd0808855"

BLOSC2 = "blosc2-shuffle-zstd1"
GOLDEN_CODEC = "841ab56c959ca24043c6e4934326cb36ca96ef6dc2467659b5ccba7caeefcf54"
GOLDEN_INT8 = "f09304e8c48a9a43805e60e1bfec32ed28a25a70dcb900f7bd12406d6eb45332"
GOLDEN_DECODED = "0132e0ded61caf33e5b38cb13a199a9c3b4161af9a6dcd2f85c14355a460cf84"
GOLDEN_DECODED_CODEC = "93a600ce1362ef6e4a7c61f7220ef9eae89f5309f8820ee01883f94b34afc0c3"

AUDIO: dict[str, Any] = {
    "media_sha256": "01" * 32,
    "stream": "audio",
    "sampling": {"num_segments": 10, "offset_ms": -500, "note": "Geräusch 音"},
    "decode": {"backend": "pyav", "version": 2, "resampled": True, "gain": None},
    "encoder": {"name": "beats", "weights_sha256": "ef" * 32, "layers": ["tokens"]},
    "dtype": "bfloat16",
}


def leaves(record: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all values that are not dicts."""
    found: list[tuple[str, ...]] = []
    for name, value in record.items():
        found += leaves(value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


def changed(record: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy with one value replaced by another of its kind."""
    record = copy.deepcopy(record)
    holder = record
    for name in path[:-1]:
        holder = holder[name]
    old = holder[path[-1]]
    if path == ("dtype",):
        holder[path[-1]] = "float32"
    elif isinstance(old, str):
        holder[path[-1]] = old[:-1] + ("0" if old[-1] != "0" else "1")
    elif isinstance(old, list):
        holder[path[-1]] = [*old, 24]
    else:
        holder[path[-1]] = old + 1
    return record


def test_canonical_json_is_sorted_compact_utf8() -> None:
    value = {"b": [1, (True, None)], "a": {"ü": "x", "Z": -5}}
    assert canonical_json(value) == '{"a":{"Z":-5,"ü":"x"},"b":[1,[true,null]]}'.encode()


def test_canonical_json_tells_numbers_flags_and_text_apart() -> None:
    forms = {canonical_json(value) for value in (1, True, "1", "true", None, "null", [1], [[1]])}
    assert len(forms) == 8


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (0.5, "$"),
        ({"fps": 25.0}, "$.fps"),
        ({"a": [1, {"b": float("nan")}]}, "$.a[1].b"),
        ({"a": b"x"}, "$.a"),
        ({"a": {1, 2}}, "$.a"),
        ({"a": np.int64(3)}, "$.a"),
        ({"a": {3: "x"}}, "$.a"),
        ({"a": (1, 2, object())}, "$.a[2]"),
    ],
)
def test_values_without_a_stable_form_are_refused_by_path(value: object, path: str) -> None:
    with pytest.raises(TypeError) as error:
        canonical_json(value)
    assert str(error.value).startswith(f"{path} ")


def test_invalid_unicode_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        canonical_json({"name": "\ud800"})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from("abcdef"), PLAIN))
def test_order_of_insertion_does_not_matter(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize(
    ("fields", "golden"),
    [
        (FIELDS, GOLDEN_VIDEO),
        (FIELDS | {"codec": "raw"}, GOLDEN_VIDEO),
        (FIELDS | {"codec": BLOSC2}, GOLDEN_CODEC),
        (FIELDS | {"dtype": "int8"}, GOLDEN_INT8),
        (AUDIO, GOLDEN_AUDIO),
    ],
)
def test_golden_keys(fields: dict[str, Any], golden: str) -> None:
    assert FeatureKey(**fields).digest == golden


DECODED = {name: value for name, value in FIELDS.items() if name not in ("encoder", "dtype")}


@pytest.mark.parametrize(
    ("codec", "golden"), [("raw", GOLDEN_DECODED), (BLOSC2, GOLDEN_DECODED_CODEC)]
)
def test_golden_keys_of_decoded_windows(codec: str, golden: str) -> None:
    assert DecodedKey(**DECODED, codec=codec).digest == golden


def test_a_codec_that_is_raw_leaves_no_trace_in_the_record() -> None:
    assert "codec" not in FeatureKey(**FIELDS).record()
    raw, small = FeatureKey(**FIELDS).record(), FeatureKey(**FIELDS, codec=BLOSC2).record()
    assert differing_fields(raw, small) == {"codec": (ABSENT, BLOSC2)}


def test_decoded_windows_know_nothing_of_the_encoder_and_say_their_level() -> None:
    record = DecodedKey(**DECODED).record()
    assert record == {"schema": 1, "level": "decoded", **DECODED}


@pytest.mark.parametrize("path", leaves(DECODED), ids=".".join)
def test_every_field_of_decoded_windows_changes_their_key(path: tuple[str, ...]) -> None:
    one, other = DecodedKey(**DECODED), DecodedKey(**changed(DECODED, path))
    assert one.digest != other.digest
    assert list(differing_fields(one.record(), other.record())) == [".".join(path)]


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("media_sha256", "xy", ValueError),
        ("stream", "", ValueError),
        ("codec", "lz4", ValueError),
        ("sampling", {"fps": 1.5}, TypeError),
        ("decode", [1], TypeError),
    ],
)
def test_bad_fields_of_decoded_windows_are_refused_by_name(
    field: str, value: object, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=field):
        DecodedKey(**(DECODED | {field: value}))


def test_key_is_the_same_in_another_process() -> None:
    code = (
        "import sys, json; from crab_platform.identity import FeatureKey;"
        "print(FeatureKey(**json.loads(sys.argv[1])).digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(FIELDS)],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == GOLDEN_VIDEO


@pytest.mark.parametrize("path", leaves(FIELDS), ids=".".join)
def test_every_field_alone_changes_the_key_and_is_named(path: tuple[str, ...]) -> None:
    one, other = FeatureKey(**FIELDS), FeatureKey(**changed(FIELDS, path))
    assert one.digest != other.digest
    assert list(differing_fields(one.record(), other.record())) == [".".join(path)]


@pytest.mark.parametrize("path", leaves(FeatureKey(**FIELDS).record()), ids=".".join)
def test_no_value_of_the_record_is_left_out_of_the_digest(path: tuple[str, ...]) -> None:
    record = FeatureKey(**FIELDS).record()
    assert digest(record) == GOLDEN_VIDEO
    assert digest(changed(record, path)) != GOLDEN_VIDEO


def test_differing_fields_shows_both_values_and_what_is_absent() -> None:
    left = {"sampling": {"size": 224, "rule": "uniform"}, "decode": {"version": 1}}
    right = {"sampling": {"size": 336, "rule": "uniform"}, "decode": {"version": 1, "fix": True}}
    assert differing_fields(left, right) == {
        "sampling.size": (224, 336),
        "decode.fix": (ABSENT, True),
    }
    assert differing_fields(left, copy.deepcopy(left)) == {}
    assert differing_fields({"a": 1}, {"a": True}) == {"a": (1, True)}


def test_a_key_does_not_change_with_the_dict_it_was_made_from() -> None:
    fields = copy.deepcopy(FIELDS)
    key = FeatureKey(**fields)
    fields["encoder"]["layers"].append(1)
    key.record()["sampling"]["size"] = 1
    assert key.digest == GOLDEN_VIDEO


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("media_sha256", "AB" * 32, ValueError),
        ("media_sha256", "", ValueError),
        ("stream", "", ValueError),
        ("dtype", "int4", ValueError),
        ("dtype", "uint8", ValueError),
        ("codec", "zstd", ValueError),
        ("sampling", {"fps": 1.5}, TypeError),
        ("encoder", ["clip"], TypeError),
    ],
)
def test_bad_fields_are_refused_by_name(field: str, value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=field):
        FeatureKey(**(FIELDS | {field: value}))


def test_sha256_of_a_file_equals_that_of_its_bytes() -> None:
    data = bytes(range(256)) * 10_000
    assert sha256_file(io.BytesIO(data)) == sha256_hex(data)
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
