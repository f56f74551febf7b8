"""What of a training run lies in the host's memory. Imports no torch: specs are checked without."""

from __future__ import annotations

from typing import Any, Literal

Offload = Literal["none", "optimizer", "all"]
"""Nothing; float32 weights, gradients and Adam's state, which then steps on the host; or all sharded weights too."""


def objection(offload: Offload, zero_stage: int) -> str | None:
    """Why DeepSpeed cannot do this at this stage, and what it can; None if it can."""
    if offload == "none" or zero_stage == 3 or (offload == "optimizer" and zero_stage == 2):
        return None
    if zero_stage == 2:
        return "zero_stage 2 offloads the optimizer only: take offload 'optimizer', or zero_stage 3 for 'all'"
    return (
        f"zero_stage {zero_stage} offloads nothing: take offload 'none', or zero_stage 2 or 3 for "
        f"{offload!r}"
    )


def zero_settings(offload: Offload, *, use_gpu: bool) -> dict[str, Any]:
    """What DeepSpeed's `zero_optimization` says of it.

    torch's Adam steps on the host as well: the same arithmetic as without offload, and nothing to compile at run time.
    """
    # Pinned memory is what a GPU copies from; without one there is nothing to pin for.
    host = {"device": "cpu", "pin_memory": use_gpu}
    parts = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[offload]
    return {f"offload_{part}": dict(host) for part in parts}
