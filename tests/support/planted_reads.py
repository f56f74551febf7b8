"""Encoders that look at something which their key does not cover: what an audit must find."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import socket
import subprocess
from collections.abc import Callable
from functools import partial

import numpy as np

from crab_platform.work import Array, Encode, Work

Look = Callable[[str], object]


def _file(path: str) -> object:
    return np.fromfile(path, dtype=np.uint8)


def _native(path: str) -> object:
    """As a library in C opens a file: no Python sees it."""
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fclose.argtypes = [ctypes.c_void_p]
    return libc.fclose(libc.fopen(path.encode(), b"rb"))


def _folder(path: str) -> object:
    return os.listdir(os.path.dirname(path))


def _variable(path: str) -> object:
    return os.environ.get("CRAB_PLANTED_GAIN", "1")


def _in_environment(path: str) -> object:
    return "CRAB_PLANTED_BIAS" in os.environ


def _socket(path: str) -> object:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", 9))


def _program(path: str) -> object:
    return subprocess.run(["true"], check=True)


def _own_file(path: str) -> object:
    """Not a bug: a file that the computation wrote itself is no input."""
    own = f"{path}.own"
    with open(own, "wb") as file:
        file.write(b"1")
    with open(own, "rb") as file:
        return file.read()


LOOKS: dict[str, Look] = {
    "file": _file,
    "native": _native,
    "folder": _folder,
    "variable": _variable,
    "in environment": _in_environment,
    "socket": _socket,
    "program": _program,
    "own file": _own_file,
}


def planted(work: Work, look: str, path: str) -> Work:
    """The same job with an audio encoder that looks."""
    stream = work.streams["audio"]
    made = dataclasses.replace(stream, make_encoder=partial(_make, stream.make_encoder, look, path))
    return dataclasses.replace(work, streams={**work.streams, "audio": made})


def _make(make_encoder: Callable[[], Encode], look: str, path: str) -> Encode:
    encode = make_encoder()

    def looking(array: Array) -> dict[str, Array]:
        LOOKS[look](path)
        return encode(array)

    return looking
