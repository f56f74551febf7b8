"""Work shared among processes: every item once, whatever the number of workers, and its errors in plain words."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
import ray

from crab_platform.parallel import each
from crab_platform.ray_cluster import connected
from crab_platform.storage import StoreRefused, StoreUnreachable
from jobs.run import JobFailed, run_spec

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("workers", "count"), [(1, 3), (2, 5), (2, 1), (3, 0)])
def test_every_item_is_done_once(workers: int, count: int) -> None:
    with connected(num_cpus=2):
        done = each(
            lambda: lambda number: 2 * number, iter(range(count)), workers=workers, cpus=0.5
        )
        assert sorted(done) == [2 * number for number in range(count)]


def _in_a_worker(error: Exception) -> None:
    work = _raises(error)
    with connected(num_cpus=2):
        list(each(lambda: work, iter([1]), workers=1, cpus=0.5))


def _in_ray_data(error: Exception) -> None:
    with connected(num_cpus=2):
        ray.data.range(1).map_batches(_raises(error)).materialize()


def _raises(error: Exception) -> Callable[[object], object]:
    def work(_: object) -> object:
        raise error from OSError("HTTP 403")  # as most of ours are raised

    return work


@pytest.mark.parametrize("where", [_in_a_worker, _in_ray_data])
def test_an_error_of_a_worker_is_told_in_its_own_words(
    where: Callable[[Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(error: Exception) -> Exception:
        kind = types.ModuleType("jobs.failing")
        kind.run = lambda spec: where(error)  # type: ignore[attr-defined]  # a module made here
        monkeypatch.setitem(sys.modules, "jobs.failing", kind)
        with pytest.raises((JobFailed, StoreUnreachable)) as found:
            run_spec(types.SimpleNamespace(job="failing", name="x"))  # type: ignore[arg-type]  # no real kind
        return found.value

    said = told(ValueError("clip 7 has 3 channels"))
    assert isinstance(said, JobFailed)
    assert str(said).startswith("failing job 'x' failed: ValueError: clip 7 has 3 channels\n")
    refused = told(StoreRefused("s3://b: no permission"))
    assert isinstance(refused, StoreUnreachable)
    assert str(refused) == "s3://b: no permission"
