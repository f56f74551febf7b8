"""The batches of a train job, read from a store: the same with and without prefetch, and for any number of workers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_samples import Damage
from support.random_features import Job, write_job

from crab_platform.packs import CorruptEntry
from crab_platform.ray_cluster import connected
from crab_platform.storage import Store
from crab_platform.training import TrainingConfig, train
from jobs.recipe import CrabRecipe
from jobs.spec import TrainSpec

Batches = list[dict[str, Any]]


def changed(job: Job, **sections: dict[str, Any]) -> Job:
    """The same job with some values of its spec changed."""
    record = job.spec.model_dump()
    for section, values in sections.items():
        record[section] |= values
    return Job(spec=TrainSpec.model_validate(record), manifest=job.manifest, adapter=job.adapter)


def batches(recipe: CrabRecipe, *steps: int, rank: int = 0, world_size: int = 2) -> Batches:
    return [b for step in steps for b in recipe.micro_batches(step, rank, world_size)]


def same(one: Batches, other: Batches) -> bool:
    """Bit for bit."""
    return len(one) == len(other) and all(
        a["tasks"] == b["tasks"]
        and a["normalizers"] == b["normalizers"]
        and a["counts"] == b["counts"]
        and a["tensors"].keys() == b["tensors"].keys()
        and all(torch.equal(a["tensors"][name], b["tensors"][name]) for name in a["tensors"])
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def job(tmp_path: Path, store: Store) -> Job:
    return write_job(tmp_path, store.url, workers={"prefetch": 0})


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_prefetch_changes_no_batch_and_no_random_number(job: Job, ahead: int) -> None:
    expected = batches(job.recipe(), *range(6))
    assert len(expected) == 12
    assert not same(expected[:2], expected[2:4])
    recipe = changed(job, workers={"prefetch": ahead}).recipe()
    states = torch.get_rng_state(), random.getstate()
    assert same(batches(recipe, *range(6)), expected)
    # As a run that goes on at its last checkpoint, and the one before.
    assert same(batches(recipe, 4, 5), expected[8:])
    assert same(batches(recipe, 2, 3), expected[4:8])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    recipe.close()


def test_another_rank_gets_its_own(job: Job) -> None:
    """One recipe is one rank's; were it asked for another's, it would not give what is ready for the first."""
    recipe = changed(job, workers={"prefetch": 2}).recipe()
    first, second = batches(recipe, 0), batches(recipe, 1, rank=1)
    plain = job.recipe()
    assert same(first, batches(plain, 0))
    assert same(second, batches(plain, 1, rank=1))
    recipe.close()


def test_damaged_features_stop_the_run_at_the_batch_that_needs_them(
    job: Job, damage: Damage
) -> None:
    job = changed(job, workers={"count": 1})
    whole = batches(job.recipe(), *range(3), world_size=1)
    spoilt = job.manifest.ready()[10].entry
    assert spoilt is not None

    def flip(data: bytes) -> bytes:
        middle = spoilt.offset + spoilt.length // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    damage(spoilt.pack, flip)

    def until_it_stops(job: Job) -> tuple[Batches, str]:
        recipe = job.recipe()
        flow = (batch for step in range(3) for batch in recipe.micro_batches(step, 0, 1))
        given: Batches = []
        try:
            for batch in flow:
                given.append(batch)
        except CorruptEntry as error:
            return given, str(error)
        raise AssertionError("every batch was given")

    given, said = until_it_stops(job)
    assert 0 < len(given) < 6
    assert same(given, whole[: len(given)])
    for ahead in (1, 2, 5):
        assert same(until_it_stops(changed(job, workers={"prefetch": ahead}))[0], given)
    assert spoilt.key[:12] in said


@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_any_number_of_workers_makes_the_same_parts(tmp_path: Path, kind: str) -> None:
    """So that a run goes on with another number: part n is micro batch n // workers of rank n % workers."""
    job = write_job(tmp_path, str(tmp_path / "cache"), batches=kind)
    by_workers = []
    for count, micro_batches in ((1, 4), (2, 2), (4, 1)):
        cut = changed(job, workers={"count": count, "micro_batches": micro_batches})
        parts: Batches = [{}] * 4
        for rank in range(count):
            recipe = cut.recipe()  # a process of its own in a run
            parts[rank::count] = batches(recipe, 3, rank=rank, world_size=count)
            recipe.close()
        by_workers.append(parts)
    assert same(by_workers[1], by_workers[0])
    assert same(by_workers[2], by_workers[0])
    assert sum(len(part["tasks"]) for part in by_workers[0]) == 8


def test_packed_batches_have_the_losses_and_metrics_of_padded_ones(tmp_path: Path) -> None:
    found = {}
    for kind in ("packed", "padded"):
        job = write_job(tmp_path, str(tmp_path / "cache"), batches=kind)
        recipe = job.recipe()
        total: dict[str, float] = {"loss": 0.0}
        for batch in batches(recipe, 0, rank=0) + batches(recipe, 0, rank=1):
            loss, sums = recipe.loss(recipe.model, batch)
            for name, value in (sums | {"loss": loss.detach()}).items():
                total[name] = total.get(name, 0.0) + float(value)
        found[kind] = recipe.metrics(total) | {"loss": total["loss"]}
        recipe.close()
    packed, padded = found["packed"], found["padded"]
    assert packed["positions"] == packed["tokens"] == padded["tokens"] < padded["positions"]
    assert packed["padding_share"] == 0
    assert padded["padding_share"] == pytest.approx(1 - padded["tokens"] / padded["positions"])
    assert 0.01 < padded["padding_share"] < 0.5
    assert 0 < packed["supervised_tokens"] < packed["tokens"]
    assert packed["mask_frames"] > 0
    same_names = packed.keys() - {"positions", "padding_share"}
    for name in same_names:
        assert packed[name] == pytest.approx(padded[name], rel=1e-5), name


@pytest.mark.ray
@pytest.mark.slow
def test_packed_samples_are_learnt_as_padded_ones_by_two_workers(tmp_path: Path) -> None:
    """Through Ray Train and ZeRO-3, with prefetch, optimizer and export."""
    losses: dict[str, list[float]] = {}
    with connected(num_cpus=3):
        for kind in ("packed", "padded"):
            job = write_job(tmp_path / kind, str(tmp_path / "cache"), batches=kind)
            config = TrainingConfig(
                name="run",
                storage_path=str(tmp_path / kind),
                micro_batches=job.spec.workers.micro_batches,
                micro_batch_size=2,
            )
            metrics: list[dict[str, float]] = []
            train(job.recipe, config, metrics.append)
            losses[kind] = [values["loss"] for values in metrics]
            assert all(("padded" == kind) == (v["padding_share"] > 0) for v in metrics)
            assert (job.adapter / "adapter").is_dir()
    assert len(losses["packed"]) == 6
    assert losses["packed"][-1] < losses["packed"][0]
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)
