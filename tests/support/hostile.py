"""Decoders that misbehave as native code does. The pool's children import these by name."""

import contextlib
import ctypes
import os
import sys
import time

import numpy as np

from crab.media import Decoded, DecodeRequest


def answer(request: DecodeRequest, **facts: object) -> Decoded:
    """A good answer: the source's name and who gave it."""
    frames = np.full((1, 2, 2, 3), len(request.source), dtype=np.uint8)
    return Decoded(
        source=request.source,
        media_sha256=f"{os.getpid()}",
        num_bytes=0,
        video=frames,
        audio=None,
        **facts,
    )


def by_name(request: DecodeRequest) -> Decoded:
    """Do what the source's name says."""
    kind, _, rest = request.source.partition(":")
    if kind == "segfault":
        ctypes.string_at(0)
    elif kind == "abort":
        os.abort()
    elif kind == "busy":
        while True:
            pass
    elif kind == "sleep":
        time.sleep(3600)
    elif kind == "hold-gil":
        # PyDLL keeps the GIL: no thread, signal handler or Python time-out of the child runs
        # meanwhile.
        ctypes.PyDLL(None).sleep(3600)
    elif kind == "allocate":
        np.ones(10 << 30, dtype=np.uint8)
    elif kind == "bad-alloc":
        sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        sys.stderr.flush()
        os.abort()
    elif kind == "exit":
        os._exit(0)
    elif kind == "fork":
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    elif kind == "flood":
        for _ in range(256):
            with contextlib.suppress(
                OSError
            ):  # native code does not look whether its log was taken
                os.write(2, b"x" * (1 << 18))
    elif kind == "raise":
        raise LookupError("broken table")
    elif kind == "once":
        # Fails the first time only: the file remembers.
        if not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(7)
    elif kind == "count":
        with open(rest, "a") as file:
            file.write("x")
        os._exit(7)
    elif kind == "modules":
        return answer(request, backend=",".join(sorted(sys.modules)))
    elif kind == "slow":
        time.sleep(float(rest))
    elif kind == "big":
        return answer(request, frame_times_us=tuple(range(3_000_000)))
    return answer(request)
