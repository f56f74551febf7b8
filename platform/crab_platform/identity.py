"""What makes two results the same: canonical JSON, digests, and the key of a feature.

A key is the SHA-256 of a record that a person can read, never of code or of a pickle: versions in
it are numbers that somebody bumps. Floats are refused because they have no stable written form
across languages and settings; say 500 ms as the integer 500. Where a feature lies and how it was
computed (bucket, workers, batch size, device) is never in a record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

KEY_SCHEMA = 1
"""Version of the key record itself. Bump when a field is added or changes its meaning: every key
changes.
"""

DTYPES = ("float16", "bfloat16", "float32", "int8")
"""How features may be stored; part of the key because it changes the values that readers get."""

RAW = "raw"
CODECS = (RAW, "blosc2-shuffle-zstd1")
"""How stored bytes may be compressed. Lossless, and yet part of the key: an entry has one set of
bytes, so a cache that was filled raw does not answer for one that is to be small.
"""

ABSENT = "(absent)"
"""Stands in `differing_fields` for a value that one of the two records does not have."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: object) -> bytes:
    """The one UTF-8 form of `value`: keys sorted by code point, no spaces, nothing escaped that
    need not be.

    Takes str, int, bool, None, list, tuple (written as a list) and dict with str keys, exactly
    these types. Raises TypeError naming the path to anything else (float, bytes, numpy scalars,
    sets, subclasses), ValueError for text that is not valid Unicode.
    """
    if not _is_plain(value):
        _check(value, "$")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        _check(value, "$")
        raise


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return sha256_hex(canonical_json(value))


def sha256_file(file: BinaryIO) -> str:
    """SHA-256 of what is left to read in an open binary file, in pieces: memory does not grow with
    the file.
    """
    hasher = hashlib.sha256()
    while block := file.read(1 << 20):
        hasher.update(block)
    return hasher.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Everything declared that decides the features of one stream of one clip.

    `sampling`, `decode` and `encoder` are records of their owners; nothing here looks inside them.
    They are copied on the way in, so a caller that changes its dict later does not change the key.
    """

    media_sha256: str
    stream: str
    """Which part of the media: "video", "audio" or "image" today, any word for this module."""
    sampling: Mapping[str, Any]
    decode: Mapping[str, Any]
    encoder: Mapping[str, Any]
    dtype: str
    """How the features are stored, one of DTYPES."""
    codec: str = RAW
    """How the stored bytes are compressed, one of CODECS."""

    def __post_init__(self) -> None:
        _check_source(self.media_sha256, self.stream)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        _check_codec(self.codec)
        _own_copies(self, ("sampling", "decode", "encoder"))

    def record(self) -> dict[str, Any]:
        """The record that the digest is made of: a fresh dict of plain JSON values."""
        return {
            "schema": KEY_SCHEMA,
            "media_sha256": self.media_sha256,
            "stream": self.stream,
            "sampling": dict(self.sampling),
            "decode": dict(self.decode),
            "encoder": dict(self.encoder),
            "dtype": self.dtype,
            **_codec_field(self.codec),
        }

    @property
    def digest(self) -> str:
        """The key: 64 hex digits."""
        return digest(self.record())


WINDOW = "window"
"""The name of the one array of an entry under a DecodedKey; no encoder gives that name to an output."""


@dataclass(frozen=True, kw_only=True)
class DecodedKey:
    """Everything declared that decides the decoded windows of one stream of one clip.

    What an encoder is fed, before any encoder: a new encoder that takes the same windows does not
    decode again. There is no dtype: arrays stay as they were decoded.
    """

    media_sha256: str
    stream: str
    """As in FeatureKey."""
    sampling: Mapping[str, Any]
    decode: Mapping[str, Any]
    codec: str = RAW
    """As in FeatureKey."""

    def __post_init__(self) -> None:
        _check_source(self.media_sha256, self.stream)
        _check_codec(self.codec)
        _own_copies(self, ("sampling", "decode"))

    def record(self) -> dict[str, Any]:
        """The record that the digest is made of. `level` keeps it apart from every feature's."""
        return {
            "schema": KEY_SCHEMA,
            "level": "decoded",
            "media_sha256": self.media_sha256,
            "stream": self.stream,
            "sampling": dict(self.sampling),
            "decode": dict(self.decode),
            **_codec_field(self.codec),
        }

    @property
    def digest(self) -> str:
        """The key: 64 hex digits."""
        return digest(self.record())


AnyKey = FeatureKey | DecodedKey
"""Of which an entry can be: both have `record()`, `digest`, `stream`, `media_sha256` and `codec`."""


def differing_fields(
    left: Mapping[str, Any], right: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Which fields differ between two key records: dotted path -> (value in `left`, value in
    `right`).

    Lists count as one value. A field that one side lacks shows ABSENT there. Empty when the records
    are equal.
    """
    found: dict[str, tuple[object, object]] = {}
    for name in sorted(left.keys() | right.keys()):
        one, other = left.get(name, ABSENT), right.get(name, ABSENT)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for path, pair in differing_fields(one, other).items():
                found[f"{name}.{path}"] = pair
        elif name not in left or name not in right or canonical_json(one) != canonical_json(other):
            found[name] = (one, other)
    return found


def _check_source(media_sha256: str, stream: str) -> None:
    if not _SHA256.fullmatch(media_sha256):
        raise ValueError(
            f"media_sha256 is {media_sha256!r}; expected 64 lower-case hex digits (use sha256_file)"
        )
    if not stream:
        raise ValueError("stream is empty; expected a name such as 'video' or 'audio'")


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}; expected one of {', '.join(CODECS)}")


def _codec_field(codec: str) -> dict[str, str]:
    """Nothing for raw bytes: keys are as they were before there were codecs."""
    return {} if codec == RAW else {"codec": codec}


def _own_copies(key: object, names: tuple[str, ...]) -> None:
    """Replace the records of a frozen key by checked copies of its own."""
    for name in names:
        given = getattr(key, name)
        _check(given, name)
        if not isinstance(given, dict):
            raise TypeError(f"{name} is a {type(given).__name__}; expected a dict")
        object.__setattr__(key, name, json.loads(canonical_json(given)))


def _is_plain(value: object) -> bool:
    """Whether `_check` has nothing to say but of text; it is ten times faster, as it keeps no path."""
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind is dict:
        assert isinstance(value, dict)
        return all(type(name) is str for name in value) and all(map(_is_plain, value.values()))
    return kind in (list, tuple) and all(map(_is_plain, cast("list[object]", value)))


_LEAVES = frozenset({str, int, bool, type(None)})


def _check(value: object, path: str) -> None:
    kind = type(value)
    if kind is dict:
        assert isinstance(value, dict)
        for name, inner in value.items():
            if type(name) is not str:
                raise TypeError(
                    f"{path} has the key {name!r} ({type(name).__name__}); expected str keys"
                )
            _check_text(name, path)
            _check(inner, f"{path}.{name}")
    elif kind in (list, tuple):
        assert isinstance(value, list | tuple)
        for position, inner in enumerate(value):
            _check(inner, f"{path}[{position}]")
    elif kind is str:
        assert isinstance(value, str)
        _check_text(value, path)
    elif value is not None and kind not in (int, bool):
        raise TypeError(
            f"{path} is {value!r} ({kind.__name__}), which has no stable written form; expected "
            "str, int, bool, None, "
            "list or dict (write a fraction as an integer in a smaller unit, or as a string)"
        )


def _check_text(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} holds text that is not valid Unicode: {text!r}") from error
