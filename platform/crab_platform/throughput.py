"""How fast a step went and what it took, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch

_Batch = TypeVar("_Batch")
_RATES = {"tokens": "tokens_per_s", "supervised_tokens": "supervised_tokens_per_s"}
"""Numbers of a step that a recipe may tell, and what they are called by the second."""


class Waited:
    """Goes through batches and adds up the seconds (`seconds`) that this rank waited for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def through(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield batch


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process ever held: of the GPU's memory, as tensors, or without one of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Not getrusage: that starts with what the process had that this one was forked from.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024  # it says kB and means KiB


def rates(
    metrics: Mapping[str, float],
    *,
    seconds: float,
    waited_s: float,
    peak_bytes: float,
    samples: int,
) -> dict[str, float]:
    """Metrics of a step that took `seconds`; `waited_s` and `peak_bytes` are those of the worst rank."""
    found = {
        "seconds_per_step": seconds,
        "samples_per_s": samples / seconds,
        "data_wait_share": waited_s / seconds,
        "peak_memory_mb": peak_bytes / 1e6,
    }
    return found | {
        rate: metrics[name] / seconds for name, rate in _RATES.items() if name in metrics
    }
