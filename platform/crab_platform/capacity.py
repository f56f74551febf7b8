"""How many trials a cluster can run side by side: Ray Tune waits for ever for one that fits nowhere.

Every worker of a trial takes its CPUs and GPUs from one node; a trial of several workers may spread over nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class NoRoom(Exception):  # noqa: N818 (the condition)
    """Not one trial could ever start on this cluster."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one worker of a trial takes, and how many workers there are."""

    workers: int
    cpus: float
    gpus: float = 0

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPUs" if self.gpus else ""
        each = f"{self.cpus:g} CPUs{gpus}"
        return each if self.workers == 1 else f"{self.workers} workers of {each} each"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    max_concurrent: int
    sentence: str
    """The same for a person."""


def capacity(need: Need, nodes: Sequence[Mapping[str, float]], wanted: int | None) -> Capacity:
    """How many trials run at once on `nodes` (the resources of each), at most `wanted`.

    Raises NoRoom, which says what there is and what is needed.
    """
    slots = sum(_slots(need, node) for node in nodes)
    fits = slots // need.workers
    there = ", ".join(_said(node) for node in nodes) or "no node"
    if fits < 1:
        raise NoRoom(
            f"no trial can ever start: one needs {need}, and the cluster has {there}. Ask for less "
            "(train.workers.count, train.workers.cpus, train.workers.gpu), or start the sweep where there is more"
        )
    count = fits if wanted is None else min(fits, wanted)
    limit = "" if count == fits else f" of {fits} that would fit"
    return Capacity(
        max_concurrent=count,
        sentence=f"{count} at a time{limit}: a trial takes {need}, the cluster has {there}",
    )


def living_nodes() -> list[dict[str, Any]]:
    """What Ray says of every living node of the cluster that we are connected to."""
    import ray

    nodes: Any = ray.nodes  # has no types
    return [node for node in nodes() if node["Alive"]]


def _slots(need: Need, node: Mapping[str, float]) -> int:
    by_cpu = node.get("CPU", 0.0) // need.cpus if need.cpus else float("inf")
    by_gpu = node.get("GPU", 0.0) // need.gpus if need.gpus else float("inf")
    return int(min(by_cpu, by_gpu, 10_000))


def _said(node: Mapping[str, float]) -> str:
    gpus = f" and {node['GPU']:g} GPUs" if node.get("GPU") else ""
    return f"a node of {node.get('CPU', 0.0):g} CPUs{gpus}"
