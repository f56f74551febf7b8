"""What a job on a cluster costs: pods, hours and prices by hand."""

from __future__ import annotations

from typing import Any

import pytest

from crab_platform.cluster_profile import ClusterProfile, load_cluster
from crab_platform.cost import Prices
from crab_platform.job_cost import job_cost
from crab_platform.rayjob import GroupNeed, JobRequest, ray_job

PRICES = Prices(
    currency="EUR",
    cpu_hour=0.1,
    gpu_hour=2.0,
    storage_gb_month=0,
    put_per_1000=0,
    get_per_1000=0,
    list_per_1000=0,
    egress_gb=0,
)


def job(needs: list[GroupNeed], **status: Any) -> dict[str, Any]:
    _, found, _ = load_cluster("eks-example")
    profile = ClusterProfile.model_validate(found.model_dump() | {"queue": None})
    request = JobRequest(name="a", kind="train", spec="{}", needs=needs, version="1")
    return ray_job(request, profile) | {"status": status}


def test_pods_times_hours_times_prices() -> None:
    """A head of 4 CPUs and two workers of 8 CPUs and a GPU: 20 CPUs and 2 GPUs, for an hour and a half."""
    found = job_cost(
        job(
            [GroupNeed(group="gpu", pods=2)],
            startTime="2026-12-01T10:00:00Z",
            endTime="2026-12-01T11:30:00Z",
        ),
        PRICES,
    )
    assert found.hourly == found.hourly_least == pytest.approx(20 * 0.1 + 2 * 2.0)
    assert found.hours == 1.5
    assert str(found) == "9.00 EUR"


def test_workers_that_come_and_go_make_it_a_range() -> None:
    found = job_cost(job([GroupNeed(group="cpu", pods=3, scales=True)]), PRICES)
    assert found.hourly_least == pytest.approx(0.4)
    assert found.hourly == pytest.approx(0.4 + 3 * 0.8)
    assert str(found) == "at most 0.00 EUR", "it has not begun"


def test_attempts_before_the_last_one_count() -> None:
    status = {"startTime": "2026-12-01T11:00:00Z", "endTime": "2026-12-01T12:00:00Z"}
    one = job([GroupNeed(group="cpu", pods=1)], **status)
    assert job_cost(one, PRICES).hours == 1
    assert job_cost(one, PRICES, "2026-12-01T09:00:00+00:00").hours == 3


def test_a_part_of_an_accelerator_is_one_and_parts_of_cores_are_parts() -> None:
    changed = job([GroupNeed(group="cpu", pods=1)])
    (container,) = changed["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ]
    container["resources"]["limits"] = {
        "cpu": "500m",
        "memory": "4Gi",
        "nvidia.com/mig-1g.10gb": "1",
    }
    assert job_cost(changed, PRICES).hourly == pytest.approx(0.05 + 2.0 + 0.8)
