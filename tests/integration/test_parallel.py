"""Work shared among processes: every item once, whatever the number of workers."""

from __future__ import annotations

import pytest

from crab_platform.parallel import each
from crab_platform.ray_cluster import connected

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("workers", "count"), [(1, 3), (2, 5), (2, 1), (3, 0)])
def test_every_item_is_done_once(workers: int, count: int) -> None:
    with connected(num_cpus=2):
        done = each(
            lambda: lambda number: 2 * number, iter(range(count)), workers=workers, cpus=0.5
        )
        assert sorted(done) == [2 * number for number in range(count)]
