"""Digest of weights: which numbers a network computes with, whatever file they came from.

Hashing the file would be simpler, but one set of weights comes as one file or ten shards, with or
without a text tower or a classification head, as a pickle or as safetensors; all of these give the
same features and should hit the same cache entries. So the digest is taken over the tensors that
the encoder really uses: sorted by name, each with its name, dtype, shape and bytes. Loaders widen
them to float32 first, so a file in half precision and its exact copy in float32 have one digest.

Each tensor is hashed by itself (in threads: hashlib releases the lock of the interpreter), then the
list of hashes is hashed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors. Independent of order, device, strides and sharing.

    Raises ValueError for an empty mapping: the digest of nothing would equal every other one.
    """
    if not tensors:
        raise ValueError("no tensors were given; a digest of weights needs at least one")
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        lines = pool.map(lambda name: _tensor_line(name, tensors[name]), names)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensor_line(name: str, tensor: Tensor) -> str:
    shape = "x".join(str(size) for size in tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    # One dimension first: a scalar cannot be viewed as bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = hashlib.sha256(flat.view(torch.uint8).numpy().data)
    # repr keeps the line unambiguous for any name.
    return f"{name!r} {dtype} [{shape}] {content.hexdigest()}\n"
