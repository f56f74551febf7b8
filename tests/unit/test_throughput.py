"""Rates of a step, the time that data took, and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from crab_platform import throughput


def test_rates_are_of_what_the_recipe_tells() -> None:
    metrics = {"loss": 1.0, "tokens": 3000.0, "supervised_tokens": 60.0}
    found = throughput.rates(metrics, seconds=2.0, waited_s=0.5, peak_bytes=3e9, samples=8)
    assert found == {
        "seconds_per_step": 2.0,
        "samples_per_s": 4.0,
        "data_wait_share": 0.25,
        "peak_memory_mb": 3000.0,
        "tokens_per_s": 1500.0,
        "supervised_tokens_per_s": 30.0,
    }
    without = throughput.rates({"loss": 1.0}, seconds=2.0, waited_s=0, peak_bytes=1, samples=1)
    assert "tokens_per_s" not in without


def test_only_waiting_is_counted_and_all_of_it() -> None:
    def batches() -> Iterator[int]:
        time.sleep(0.05)
        yield 1
        time.sleep(0.05)
        yield 2
        time.sleep(0.05)  # what a generator does after its last batch is waited for as well

    waited = throughput.Waited()
    seen = []
    for batch in waited.through(batches()):
        seen.append(batch)
        before = waited.seconds
        time.sleep(0.2)
        assert waited.seconds == before
    assert seen == [1, 2]
    assert waited.seconds >= 0.15


def test_an_error_of_a_batch_is_not_swallowed() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(throughput.Waited().through(broken()))


def test_the_peak_is_kept_when_memory_is_given_back() -> None:
    cpu = torch.device("cpu")
    large = torch.ones(60_000_000, dtype=torch.float32)
    peak = throughput.peak_memory_bytes(cpu)
    # The kernel counts pages by estimates.
    assert peak >= psutil.Process().memory_info().rss * 0.99
    size = large.nbytes
    del large
    assert throughput.peak_memory_bytes(cpu) >= peak * 0.99
    assert psutil.Process().memory_info().rss < peak - size / 2
