"""Packs: many clips' features in one safetensors file, and the check that every read goes through.

One object a clip makes a store pay per request; a pack of up to 256 MiB pays per byte. The file is
plain safetensors (anybody's tool opens it), written here rather than by the library because we need
to know where each entry lies and can then spare two copies of the whole. Tensors are named
`<key>/<name>`; the metadata holds for each key its record and its digest.

A key may ask for compressed tensors. In the file such a tensor is a row of bytes (U8), and its
type, shape and codec are in the metadata beside its record.

The digest of an entry covers its key and the names, types and shapes of its tensors (and codecs,
where there are any) as well as the bytes. So neither another clip's valid bytes nor a changed index
row can pass for this entry, and nothing is decompressed that was not committed.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from blake3 import blake3

from crab_platform import codec, dtypes
from crab_platform.dtypes import TOLERANCE as TOLERANCE
from crab_platform.dtypes import relative_l2 as relative_l2
from crab_platform.dtypes import tolerance_of as tolerance_of
from crab_platform.identity import CODECS, RAW, AnyKey, FeatureKey, canonical_json

PACK_SCHEMA = 1

JOIN_BYTES = 256 << 10
"""Up to here head and body are joined before they are hashed: BLAKE3 takes twice as long for 48 KiB
that do not start on one of its chunks of 1024 bytes, and copying them is cheaper than that.
"""

Array = np.ndarray[Any, Any]

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class CorruptEntry(Exception):  # noqa: N818 (says what is corrupt; an Error suffix adds nothing)
    """Stored bytes are not what was committed. Nothing of the entry left the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of an entry. `offset` counts bytes from the start of the entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    codec: str = RAW
    stored_bytes: int | None = None
    """Bytes on disk of a compressed tensor; None for a raw one, whose shape says it."""

    @property
    def count(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.count * dtypes.STORED[self.dtype][1].itemsize

    @property
    def length(self) -> int:
        """Bytes on disk."""
        return self.nbytes if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Where the features of one key lie and what they must be. Small: this is what travels."""

    key: str
    pack: str
    offset: int
    """Bytes from the start of the pack file."""
    length: int
    blake3: str
    tensors: tuple[TensorSpec, ...]
    commit: str = ""
    """Which commit made it exist."""
    layer: str = ""
    """URL of the store that it lies in, when that is not the cache's own."""


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """Features that are ready to be stored. Make it with `new_entry`, which checks them."""

    key: str
    record: dict[str, Any] = field(repr=False)
    arrays: dict[str, Array] = field(repr=False)
    """As stored but not yet compressed: the type of the key, C-contiguous, sorted by name."""
    source_url: str = ""
    source_version: str = ""
    """Size with ETag or mtime: what lets the next run skip hashing the media. "" for none."""
    decode_s: float = 0.0
    """Seconds that decoding cost, 0 where unknown or shared with another entry of the clip."""
    encode_s: float = 0.0
    """Seconds that encoding cost, 0 where unknown."""
    device: str = ""
    """Where it was encoded: "cpu" or "cuda"."""
    tolerance: float = 0.0
    """Relative L2 error that a recomputation may have; 0 asks for equal bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of features before compression, without the header's share."""
        return sum(array.nbytes for array in self.arrays.values())


def new_entry(
    key: AnyKey,
    arrays: Mapping[str, Array],
    *,
    source_url: str = "",
    source_version: str = "",
    decode_s: float = 0.0,
    encode_s: float = 0.0,
    device: str = "",
    tolerance: float = 0.0,
) -> NewEntry:
    """An entry to commit: features converted to the type that the key says, decoded windows as
    they are. What the keyword arguments mean stands at NewEntry.

    Raises ValueError when there is no array, a name has odd characters, an array is not of floats
    (decoded: of uint8 or float32), or a value is not finite once stored (float16 ends at 65504).
    """
    if not arrays:
        raise ValueError(f"no features for key {key.digest}; expected at least one named array")
    for name in arrays:
        if not _NAME.fullmatch(name):
            raise ValueError(f"feature name {name!r} is not allowed; use letters, digits and _.-")
    return NewEntry(
        key=key.digest,
        record=key.record(),
        arrays=dtypes.stored(arrays, key.dtype)
        if isinstance(key, FeatureKey)
        else dtypes.decoded(arrays),
        source_url=source_url,
        source_version=source_version,
        decode_s=decode_s,
        encode_s=encode_s,
        device=device,
        tolerance=tolerance,
    )


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """An entry's bytes as they stand in a pack, wherever that is, with what they are checked by."""

    key: str
    record: dict[str, Any] = field(repr=False)
    tensors: tuple[TensorSpec, ...]
    blake3: str
    bodies: Sequence[memoryview | bytes] = field(repr=False)
    """The bytes of all tensors, in their order; one after the other."""

    @property
    def nbytes(self) -> int:
        """Bytes in a pack, without the header's share."""
        return sum(spec.length for spec in self.tensors)


def seal(entry: NewEntry) -> Sealed:
    """Compresses where the key says so, and takes the digest."""
    way = str(entry.record.get("codec", RAW))
    at = 0
    specs: list[TensorSpec] = []
    bodies: list[memoryview | bytes] = []
    for name, array in entry.arrays.items():
        body = codec.compress(array) if way != RAW else array.reshape(-1).view(np.uint8).data
        specs.append(
            TensorSpec(
                name=name,
                dtype=dtypes.stored_type(array),
                shape=array.shape,
                offset=at,
                codec=way,
                stored_bytes=None if way == RAW else len(body),
            )
        )
        bodies.append(body)
        at += len(body)
    return Sealed(
        key=entry.key,
        record=entry.record,
        tensors=tuple(specs),
        blake3=_digest(entry.key, specs, bodies),
        bodies=bodies,
    )


def seal_copy(entry: Entry, record: dict[str, Any], data: bytearray | memoryview) -> Sealed:
    """An entry that was read, to be put into another pack as it is. Raises CorruptEntry when it is not what it was."""
    open_entry(entry, data)
    return Sealed(
        key=entry.key,
        record=record,
        tensors=entry.tensors,
        blake3=entry.blake3,
        bodies=[memoryview(data)],
    )


def build_pack(path: str, new: Sequence[NewEntry | Sealed]) -> tuple[bytes, list[Entry]]:
    """The bytes of a pack and where each entry lies in it. Keys must be different."""
    entries = [entry if isinstance(entry, Sealed) else seal(entry) for entry in new]
    header: dict[str, Any] = {}
    metadata: dict[str, str] = {"schema": str(PACK_SCHEMA)}
    starts: list[int] = []
    at = 0
    for entry in entries:
        starts.append(at)
        about: dict[str, Any] = {"record": entry.record, "blake3": entry.blake3}
        for spec in entry.tensors:
            raw = spec.codec == RAW
            header[f"{entry.key}/{spec.name}"] = {
                "dtype": dtypes.STORED[spec.dtype if raw else "uint8"][0],
                "shape": list(spec.shape) if raw else [spec.length],
                "data_offsets": [at + spec.offset, at + spec.offset + spec.length],
            }
            if not raw:
                about.setdefault("tensors", {})[spec.name] = {
                    "dtype": spec.dtype,
                    "shape": list(spec.shape),
                    "codec": spec.codec,
                }
        metadata[entry.key] = canonical_json(about).decode()
        at += entry.nbytes
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors start on a cache line
    base = 8 + len(text)
    bodies = [body for entry in entries for body in entry.bodies]
    data = b"".join([struct.pack("<Q", len(text)), text, *bodies])
    placed = [
        Entry(
            key=entry.key,
            pack=path,
            offset=base + start,
            length=entry.nbytes,
            blake3=entry.blake3,
            tensors=entry.tensors,
        )
        for entry, start in zip(entries, starts, strict=True)
    ]
    return data, placed


def open_entry(entry: Entry, data: bytearray | memoryview) -> dict[str, Array]:
    """The arrays of an entry, from its bytes, checked; raw ones share `data`'s memory and are read-only.

    float16, float32 and uint8 come as stored; bfloat16 (exact; numpy has no bfloat16) and int8
    (times its scales, which are not among the arrays) come as float32. Raises CorruptEntry naming
    the key, the pack and what differs.
    """
    layout = _layout(entry.tensors)
    wrong = layout.wrong
    if len(data) != entry.length:
        wrong = f"{len(data)} bytes, expected {entry.length}"
    elif not wrong and layout.length != entry.length:
        wrong = f"shapes need {layout.length} bytes, it has {entry.length}"
    if not wrong:
        found = _digest(entry.key, entry.tensors, [memoryview(data)])
        if found == entry.blake3:
            try:
                return _arrays(layout, memoryview(data).toreadonly())
            except ValueError as error:  # committed so: by a faulty or an ill-meaning writer
                wrong = str(error)
        else:
            wrong = (
                f"BLAKE3 over key, shapes and bytes is {found[:16]}..., the commit says "
                f"{entry.blake3[:16]}..."
            )
    raise CorruptEntry(
        f"entry {entry.key} at byte {entry.offset} of {entry.pack}: {wrong}; {remedy(entry)}"
    )


def remedy(entry: Entry) -> str:
    """What a person does about a damaged entry: without its commit it is a miss, no more."""
    place = entry.layer or "CACHE"
    return f"`crab cache verify {place} --all --quarantine` takes it back, and its preprocess job computes it anew"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """The tensors of an entry, looked at once for the many clips that have the same."""

    tensors: tuple[tuple[TensorSpec, np.dtype[Any], int], ...] = ()
    """Each with the type and the count of its numbers as stored."""
    length: int = 0
    """Bytes that they need."""
    plain: bool = False
    """Nothing is compressed or restored: readers get what is stored."""
    wrong: str = ""
    """Why no entry can have such tensors."""


@lru_cache(maxsize=4096)
def _layout(specs: tuple[TensorSpec, ...]) -> _Layout:
    end = 0
    for spec in specs:
        if spec.dtype not in dtypes.STORED:
            return _Layout(wrong=f"tensor {spec.name!r} has unknown type {spec.dtype!r}")
        if spec.codec not in CODECS:
            return _Layout(wrong=f"tensor {spec.name!r} has unknown codec {spec.codec!r}")
        if (
            spec.offset != end
            or min(spec.shape, default=0) < 0
            or spec.length < 0
            or (spec.codec == RAW) != (spec.stored_bytes is None)
        ):
            return _Layout(wrong=f"shape or offset of {spec.name!r} do not fit")
        end += spec.length
    return _Layout(
        tensors=tuple((spec, dtypes.STORED[spec.dtype][1], spec.count) for spec in specs),
        length=end,
        plain=all(spec.codec == RAW and spec.dtype in dtypes.PLAIN for spec in specs),
    )


def _arrays(layout: _Layout, data: memoryview) -> dict[str, Array]:
    """What readers get of an entry's checked bytes. Raises ValueError where these cannot be restored."""
    if layout.plain:
        return {
            spec.name: np.frombuffer(data, kind, count, spec.offset).reshape(spec.shape)
            for spec, kind, count in layout.tensors
        }
    return dtypes.restored(
        {spec.name: (spec.dtype, _array(spec, data)) for spec, _, _ in layout.tensors}
    )


def _array(spec: TensorSpec, data: memoryview) -> Array:
    """One tensor out of an entry's bytes, as stored."""
    kind = dtypes.STORED[spec.dtype][1]
    if spec.codec == RAW:
        array = np.frombuffer(data, dtype=kind, count=spec.count, offset=spec.offset)
    else:
        stored = data[spec.offset : spec.offset + spec.length]
        array = codec.decompress(stored, kind, spec.count)
    return array.reshape(spec.shape)


def _digest(key: str, specs: Sequence[TensorSpec], bodies: Sequence[memoryview | bytes]) -> str:
    # The canonical JSON of {"key": key, "tensors": shapes}, put together: clips have the same shapes.
    plain = key.isascii() and key.isalnum()  # hex digits: nothing to escape
    head = b'{"key":%s,"tensors":%s}' % (
        b'"%s"' % key.encode() if plain else canonical_json(key),
        _shapes_json(tuple(specs)),
    )
    if sum([memoryview(body).nbytes for body in bodies]) <= JOIN_BYTES:
        return blake3(b"".join([head, *bodies])).hexdigest()
    hasher = blake3(head)
    for body in bodies:
        hasher.update(body)
    return hasher.hexdigest()


@lru_cache(maxsize=4096)
def _shapes_json(specs: tuple[TensorSpec, ...]) -> bytes:
    shapes = [
        [spec.name, spec.dtype, list(spec.shape)]
        + ([] if spec.codec == RAW else [spec.codec, spec.length])
        for spec in specs
    ]
    return canonical_json(shapes)
