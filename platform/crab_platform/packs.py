"""Packs: many clips' features in one safetensors file, and the check that every read goes through.

One object a clip makes a store pay per request; a pack of up to 256 MiB pays per byte. The file is
plain safetensors (anybody's tool opens it), written here rather than by the library because we need
to know where each entry lies and can then spare two copies of the whole. Tensors are named
`<key>/<name>`; the metadata holds for each key its record and its digest.

The digest of an entry covers its key and the names, types and shapes of its tensors as well as the
bytes. So neither another clip's valid bytes nor a changed index row can pass for this entry.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from crab_platform.identity import FeatureKey, canonical_json

PACK_SCHEMA = 1

Array = np.ndarray[Any, Any]

# name of a stored type -> (name in safetensors, numpy type of the bytes)
_TYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),  # numpy has no bfloat16: its 16 bits, see `stored`
    "float32": ("F32", np.dtype("<f4")),
}
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

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(np.prod(self.shape, dtype=np.int64)) * _TYPES[self.dtype][1].itemsize


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


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """Features that are ready to be stored. Make it with `new_entry`, which checks them."""

    key: str
    record: dict[str, Any] = field(repr=False)
    arrays: dict[str, Array] = field(repr=False)
    """As stored: the type of the key, C-contiguous, sorted by name."""
    source_url: str = ""
    source_version: str = ""
    """Size with ETag or mtime: what lets the next run skip hashing the media. "" for none."""

    @property
    def nbytes(self) -> int:
        """Bytes of features, without the header's share."""
        return sum(array.nbytes for array in self.arrays.values())


def new_entry(
    key: FeatureKey,
    arrays: Mapping[str, Array],
    *,
    source_url: str = "",
    source_version: str = "",
) -> NewEntry:
    """An entry to commit, its arrays converted to the type that the key says.

    Raises ValueError when there is no array, a name has odd characters, an array is not of floats,
    or a value is not finite once stored (float16 ends at 65504).
    """
    if not arrays:
        raise ValueError(f"no features for key {key.digest}; expected at least one named array")
    for name in arrays:
        if not _NAME.fullmatch(name):
            raise ValueError(f"feature name {name!r} is not allowed; use letters, digits and _.-")
    return NewEntry(
        key=key.digest,
        record=key.record(),
        arrays={name: stored(arrays[name], key.dtype, name) for name in sorted(arrays)},
        source_url=source_url,
        source_version=source_version,
    )


def stored(array: Array, dtype: str, name: str = "array") -> Array:
    """`array` as it is written: same shape, rounded to nearest even; uint16 bits for bfloat16."""
    if array.dtype.kind != "f":
        raise ValueError(f"feature {name!r} has type {array.dtype}; expected floats")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported just below
        if dtype == "bfloat16":
            bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
            rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
            result = (rounded >> 16).astype("<u2")
            finite = np.isfinite(array) & ((result & 0x7F80) != 0x7F80)
        else:
            result = np.ascontiguousarray(array, dtype=_TYPES[dtype][1])
            finite = np.isfinite(result)
    if not finite.all():
        bad = int(finite.size - np.count_nonzero(finite))
        raise ValueError(
            f"feature {name!r}: {bad} of {finite.size} values are not finite as {dtype}; if the "
            "encoder's output is sound, store it as float32 or bfloat16"
        )
    return result.reshape(array.shape)


def build_pack(path: str, entries: Sequence[NewEntry]) -> tuple[bytes, list[Entry]]:
    """The bytes of a pack and where each entry lies in it. Keys must be different."""
    header: dict[str, Any] = {}
    metadata: dict[str, str] = {"schema": str(PACK_SCHEMA)}
    bodies: list[memoryview] = []
    found: list[tuple[NewEntry, int, int, str, tuple[TensorSpec, ...]]] = []
    at = 0
    for entry in entries:
        dtype = str(entry.record["dtype"])
        start, specs = at, []
        for name, array in entry.arrays.items():
            stop = at + array.nbytes
            header[f"{entry.key}/{name}"] = {
                "dtype": _TYPES[dtype][0],
                "shape": list(array.shape),
                "data_offsets": [at, stop],
            }
            specs.append(TensorSpec(name=name, dtype=dtype, shape=array.shape, offset=at - start))
            bodies.append(array.reshape(-1).view(np.uint8).data)
            at = stop
        digest = _digest(entry.key, specs, bodies[len(bodies) - len(specs) :])
        metadata[entry.key] = canonical_json({"record": entry.record, "blake3": digest}).decode()
        found.append((entry, start, at - start, digest, tuple(specs)))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors start on a cache line
    base = 8 + len(text)
    data = b"".join([struct.pack("<Q", len(text)), text, *bodies])
    placed = [
        Entry(
            key=entry.key,
            pack=path,
            offset=base + start,
            length=length,
            blake3=digest,
            tensors=specs,
        )
        for entry, start, length, digest, specs in found
    ]
    return data, placed


def open_entry(entry: Entry, data: bytearray) -> dict[str, Array]:
    """The arrays of an entry, from its bytes, checked; they share `data`'s memory.

    float16 and float32 come as stored; bfloat16 comes as float32 (exact; numpy has no bfloat16).
    Raises CorruptEntry naming the key, the pack and what differs.
    """
    where = f"entry {entry.key} at byte {entry.offset} of {entry.pack}"
    advice = remedy(entry)
    if len(data) != entry.length:
        raise CorruptEntry(f"{where}: {len(data)} bytes, expected {entry.length}; {advice}")
    end = 0
    for spec in entry.tensors:
        if spec.dtype not in _TYPES:
            raise CorruptEntry(f"{where}: tensor {spec.name!r} has unknown type {spec.dtype!r}")
        if spec.offset != end or min(spec.shape, default=0) < 0:
            raise CorruptEntry(f"{where}: shape or offset of {spec.name!r} do not fit; {advice}")
        end += spec.nbytes
    if end != entry.length:
        raise CorruptEntry(f"{where}: shapes need {end} bytes, it has {entry.length}; {advice}")
    found = _digest(entry.key, entry.tensors, [memoryview(data)])
    if found != entry.blake3:
        raise CorruptEntry(
            f"{where}: BLAKE3 over key, shapes and bytes is {found[:16]}..., the commit says "
            f"{entry.blake3[:16]}...; {advice}"
        )
    arrays = {}
    for spec in entry.tensors:
        kind = _TYPES[spec.dtype][1]
        count = spec.nbytes // kind.itemsize
        array = np.frombuffer(data, dtype=kind, count=count, offset=spec.offset)
        if spec.dtype == "bfloat16":
            array = (array.astype("<u4") << 16).view("<f4")
        arrays[spec.name] = array.reshape(spec.shape)
    return arrays


def remedy(entry: Entry) -> str:
    """What a person does about a damaged entry: without its commit it is a miss, no more."""
    return (
        f"delete commits/{entry.commit or '<its commit>'}.parquet and run again to compute it anew"
    )


def _digest(key: str, specs: Sequence[TensorSpec], bodies: Sequence[memoryview]) -> str:
    shapes = [[spec.name, spec.dtype, list(spec.shape)] for spec in specs]
    hasher = blake3(canonical_json({"key": key, "tensors": shapes}))
    for body in bodies:
        hasher.update(body)
    return hasher.hexdigest()
