"""Stored types of features: from the floats of an encoder to what is written, and back to floats.

| type     | bytes | what is lost                                             | readers get |
|----------|-------|----------------------------------------------------------|-------------|
| float32  | 4     | nothing                                                  | float32     |
| float16  | 2     | all but 11 bits of each value; ends at 65504             | float16     |
| bfloat16 | 2     | all but 8 bits of each value                             | float32     |
| int8     | 1     | all but 8 bits of a token's largest value, for all of it | float32     |

int8 has one scale for every token (the last axis holds a token's features): value = number * scale,
numbers from -127 to 127. The scales are a tensor of their own, `<name>.scale`, float32, 4 bytes a
token, which readers do not see. Decoded windows keep their type: uint8 frames, float32 sound.

Figures on real features: `make bench-dtypes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

STORED: dict[str, tuple[str, np.dtype[Any]]] = {
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype("<u2")),  # numpy has no bfloat16: its 16 bits
    "float32": ("F32", np.dtype("<f4")),
    "int8": ("I8", np.dtype("i1")),
    "uint8": ("U8", np.dtype("u1")),
}
"""Name of a stored type -> (name in safetensors, numpy type of the bytes)."""

PLAIN = ("float16", "float32", "uint8")
"""Types that readers get as they are stored, whatever stands beside them: see `restored`."""

_NAMES = {kind: name for name, (_, kind) in STORED.items()}

SCALE = ".scale"
"""Ends the name of the tensor that holds the scales of an int8 tensor."""

TOLERANCE: dict[str, float] = {
    "float32": 1e-4,  # 100 times what was measured; float32 on another device may be 1e-5 apart
    "float16": 5e-4,  # values 1e-4 apart fall to the other side of a rounding step: 2.4e-4
    "bfloat16": 2e-3,  # the same with steps of 2^-8: 7e-4
    "int8": 4e-3,  # the same with steps of a 127th of the token's largest value: 1.5e-3
}
"""Relative L2 error that a recomputation in float32 may have, by stored type.

Measured with the tiny encoders on nine clips, recomputed with other batch sizes, thread counts and
without oneDNN: 1.3e-6, 2.4e-5, 7.9e-5, 1.6e-4, in this order. Much more must not be allowed: the
same encoder run in bfloat16 instead of float32 is only 1e-2 to 2e-2 away and has to be found.
"""

_ARITHMETIC = {"float32": 0.0, "float16": 5e-3, "bfloat16": 3e-2}


def tolerance_of(dtype: str, compute_dtype: str = "float32") -> float:
    """TOLERANCE of a stored type for an encoder whose own arithmetic is `compute_dtype`.

    Arithmetic in bfloat16 moves with the batch size: 9e-3 was measured with the tiny encoders, four
    layers deep; the paper's are 24 deep. Raises KeyError for a type that is not known.
    """
    return TOLERANCE[dtype] + _ARITHMETIC[compute_dtype]


# A scale is never so small that a reader's float32 product loses bits, and never so large that 127
# times it is infinite.
_SMALLEST = np.finfo(np.float32).tiny
_LARGEST = np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0))


def stored_type(array: Array) -> str:
    """The name of the type of an array that `stored` or `decoded` made."""
    return _NAMES[array.dtype]


def stored(arrays: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Features as they are written in `dtype`, sorted by name, C-contiguous.

    float16 and bfloat16 round to nearest even, the latter into uint16 bits. Raises ValueError when
    an array is not of floats, or a value is not finite once stored.
    """
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise ValueError(f"feature {name!r} has type {array.dtype}; expected floats")
        if dtype == "int8":
            if name + SCALE in arrays:
                raise ValueError(
                    f"feature name {name + SCALE!r} is not allowed beside {name!r} in int8: its "
                    "scales are stored under that name"
                )
            found[name], found[name + SCALE] = _int8(array, name)
        else:
            found[name] = _float(array, dtype, name)
    return dict(sorted(found.items()))


def decoded(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Decoded windows as they are written: the same values, sorted by name, C-contiguous.

    Raises ValueError for another type than uint8 (frames) and float32 (sound), and for sound that
    is not finite.
    """
    found: dict[str, Array] = {}
    for name in sorted(arrays):
        array = arrays[name]
        if _NAMES.get(array.dtype) not in ("uint8", "float32"):
            raise ValueError(
                f"decoded {name!r} has type {array.dtype}; expected uint8 frames or float32 sound"
            )
        if array.dtype == np.uint8:
            found[name] = np.ascontiguousarray(array).reshape(array.shape)
        else:
            found[name] = _float(array, "float32", name)
    return found


def restored(tensors: Mapping[str, tuple[str, Array]]) -> dict[str, Array]:
    """What readers get, from the stored type and array of each tensor.

    int8 and bfloat16 come as float32, everything else as it is stored and without a copy. Raises
    ValueError for an int8 tensor without scales that fit.
    """
    found: dict[str, Array] = {}
    for name, (dtype, array) in tensors.items():
        if dtype == "int8":
            scale_dtype, scale = tensors.get(name + SCALE, ("none", array))
            if scale_dtype != "float32" or scale.shape != array.shape[:-1]:
                raise ValueError(f"the scales of int8 tensor {name!r} are absent or do not fit")
            found[name] = array.astype(np.float32)
            found[name] *= scale[..., None]
        elif dtype == "bfloat16":
            bits = array.reshape(-1).astype("<u4") << 16
            found[name] = bits.view("<f4").reshape(array.shape)
        elif not _is_scale(name, tensors):
            found[name] = array
    return found


def relative_l2(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """How far `other` is from `one`: |other - one| / |one|, the largest over the arrays.

    0 when all values are equal; infinite when names or shapes differ, a value is not finite, or an
    array of zeros became anything else.
    """
    if one.keys() != other.keys():
        return float("inf")
    return max((_distance(one[name], other[name]) for name in one), default=0.0)


def _distance(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return float("inf")
    wide_one, wide_other = one.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(wide_one).all() and np.isfinite(wide_other).all()):
        return float("inf")
    apart = float(np.linalg.norm((wide_other - wide_one).reshape(-1)))
    size = float(np.linalg.norm(wide_one.reshape(-1)))
    if apart == 0:
        return 0.0
    return apart / size if size else float("inf")


def _float(array: Array, dtype: str, name: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is reported just below
        if dtype == "bfloat16":
            bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
            rounded = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
            result = (rounded >> 16).astype("<u2")
            finite = np.isfinite(array) & ((result & 0x7F80) != 0x7F80)
        else:
            result = np.ascontiguousarray(array, dtype=STORED[dtype][1])
            finite = np.isfinite(result)
    if not finite.all():
        bad = int(finite.size - np.count_nonzero(finite))
        raise ValueError(
            f"feature {name!r}: {bad} of {finite.size} values are not finite as {dtype}; if the "
            "encoder's output is sound, store it as float32 or bfloat16"
        )
    return result.reshape(array.shape)


def _int8(array: Array, name: str) -> tuple[Array, Array]:
    """Numbers and scales. Each value is at most half a scale off; a token of zeros stays zeros."""
    if array.ndim == 0:
        raise ValueError(f"feature {name!r} is a single number; int8 needs an axis of features")
    exact = _float(array, "float32", name)
    largest = np.abs(exact).max(axis=-1, initial=0)
    scale = np.clip(largest / np.float32(127), _SMALLEST, _LARGEST).astype("<f4")
    numbers = np.clip(np.rint(exact / scale[..., None]), -127, 127).astype(np.int8)
    return np.ascontiguousarray(numbers), np.ascontiguousarray(scale).reshape(array.shape[:-1])


def _is_scale(name: str, tensors: Mapping[str, tuple[str, Array]]) -> bool:
    owner = tensors.get(name.removesuffix(SCALE))
    return name.endswith(SCALE) and owner is not None and owner[0] == "int8"
