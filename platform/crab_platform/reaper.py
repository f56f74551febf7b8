"""Sees to it that what a trial of several workers held is given back: the placement groups of Ray Train.

Ray Train removes its group when a run ends, and asks Ray's state API whether a run that says nothing is still there.
With the dashboard off nobody answers, groups of stopped trials stay, and the sweep waits for their CPUs for ever
(reference/platforms.md, 0.1). So every group is looked at here when its trial has ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

_LOG = logging.getLogger(__name__)
PATIENCE_S = 20.0
"""So long a group may be there after its trial has ended."""


class Reaper:
    """Removes groups that outlive their trial. `close` waits until all that it was told of are gone."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self.reaped: list[str] = []
        """Groups that had to be removed here."""

    def watch(self, groups: Sequence[str]) -> None:
        """The trial of these groups (Ray's ids) has ended, or is about to be started again."""
        if groups:
            thread = threading.Thread(target=self._see_off, args=(groups,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Waits for all."""
        for thread in self._threads:
            thread.join()

    def _see_off(self, groups: Sequence[str]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        left = _alive(groups)
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            left = _alive(left)
        for name in left:
            _LOG.warning(
                "placement group %s outlived its trial by %.0f s: removed", name, PATIENCE_S
            )
            _remove(name)
            self.reaped.append(name)


def _alive(groups: Sequence[str]) -> list[str]:
    from ray.util import placement_group_table

    table: Any = placement_group_table  # has no types
    known: dict[str, Any] = table()
    return [name for name in groups if known.get(name, {}).get("state", "REMOVED") != "REMOVED"]


def _remove(name: str) -> None:
    from ray._raylet import PlacementGroupID  # there is no public way from an id to a group
    from ray.util import remove_placement_group
    from ray.util.placement_group import PlacementGroup

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
