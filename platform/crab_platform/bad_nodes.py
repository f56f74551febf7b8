"""Nodes on which trials fail one after the other are not used again: one broken host can take most of a sweep with it.

In a sweep of Weights & Biases 470 of 500 runs were given to one such host (wandb/wandb #5088): a host that fails at
once is always the first that is free.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from ray import tune

from crab_platform.capacity import Need

_LOG = logging.getLogger(__name__)
TOO_MANY = 3
"""Failures in a row on a node, of two trials at least, without a result that was made there between them."""
_NODE = "ray.io/node-id"
"""Label that Ray gives every node."""


class BadNodes:
    """Which nodes are set aside. At least one is always left."""

    def __init__(self) -> None:
        self._failed: defaultdict[str, list[int]] = defaultdict(list)
        self._bad: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Ray's ids of the nodes that are set aside."""
        return sorted(self._bad)

    def worked(self, node: str) -> None:
        """A result was made there."""
        self._failed.pop(node, None)

    def failed(self, node: str, trial: int, alive: Iterable[str]) -> bool:
        """A trial failed there; `alive` are the nodes that there are. True where it is the one too many."""
        if not node:  # that of a trial of several workers is not known
            return False
        self._failed[node].append(trial)
        enough = len(self._failed[node]) >= TOO_MANY and len(set(self._failed[node])) > 1
        if node in self._bad or not enough or not set(alive) - self._bad - {node}:
            return False
        self._bad.add(node)
        _LOG.warning(
            "node %s is set aside: %d failures in a row there, of trials %s",
            *(node, len(self._failed[node]), sorted(set(self._failed[node]))),
        )
        return True


def resources(need: Need, avoid: Sequence[str]) -> tune.PlacementGroupFactory:
    """What the process of a trial asks for, on any node but these. That of several workers only starts these, and asks
    for next to nothing: Ray Tune wants it to be something."""
    elsewhere: dict[str, Any] = {}
    if avoid:
        elsewhere = {"bundle_label_selector": [{_NODE: f"!in({','.join(avoid)})"}]}
    bundle: dict[str, float] = {"memory": 1}
    if need.workers == 1:
        bundle = {"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {})
    return tune.PlacementGroupFactory([bundle], **elsewhere)
