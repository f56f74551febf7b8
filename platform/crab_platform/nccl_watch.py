"""Ray Train's detector of hung NCCL communicators, beside our own watch over ranks (hang.py), to see more of a hang.

It asks NCCL itself which ranks lag in which communicator, and writes that with stacks to hang_detector/ beside the
checkpoints. It only observes: what hangs is ended by hang.py, which needs no NCCL. Ray reads these variables in the
driver, when a run starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_PREFIX = "RAY_TRAIN_"


@contextmanager
def observed(*, use_gpu: bool, hang_timeout_s: float) -> Iterator[None]:
    """For a run that starts in this block. What the environment says already stays; without GPUs nothing changes."""
    settings = {
        "ENABLE_NCCL_HANG_DETECTOR": "1",
        "NCCL_RAS_ACTION": "observe",
        # Ray's own ten minutes are longer than we leave a hang alone.
        "NCCL_RAS_CONFIRM_DURATION_S": str(hang_timeout_s / 2),
    }
    ours = {
        _PREFIX + n: v for n, v in settings.items() if use_gpu and _PREFIX + n not in os.environ
    }
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
