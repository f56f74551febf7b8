"""B5: NaN or infinity on one rank, in its gradients, its loss or its features: no rank applies the step, no checkpoint
holds it, and the third in a row ends the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.tiny_training import Plan, Run, run, write_llm

from crab_platform import checkpoint
from crab_platform.guards import SkippedTooOftenError
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with connected(num_cpus=3):
        yield write_llm(tmp_path_factory.mktemp("llm"))


def assert_step_two_was_skipped(seen: Run) -> None:
    assert [m["skipped_steps"] for m in seen.metrics] == [0, 1, 1, 1]
    for step, adam_steps in ((1, 1), (2, 1), (4, 3)):
        marker, state = checkpoint.read(open_store(seen.folder), seen.checkpoint(step).name)
        assert marker.adam_step == adam_steps
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    # On every rank: weights that one of them had changed would differ from those before the step.
    before, after = (
        checkpoint.read(open_store(seen.folder), seen.checkpoint(step).name)[1] for step in (1, 2)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in seen.exported().values())


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "nan_in", "infinite"),
    [
        (3, "float32", "gradient", False),
        (3, "float32", "loss", False),
        (3, "float32", "features", False),
        (3, "float32", "gradient", True),
        (3, "bfloat16", "gradient", False),
        (2, "float32", "gradient", False),
        (0, "float32", "gradient", False),
        (0, "bfloat16", "features", False),
    ],
)
def test_nan_on_one_rank_is_skipped_by_all(
    llm: str, tmp_path: Path, zero_stage: int, dtype: str, nan_in: str, infinite: bool
) -> None:
    plan = Plan(
        llm=llm,
        out=str(tmp_path),
        steps=4,
        nan_at=(1,),
        nan_in=nan_in,  # type: ignore[arg-type]  # one of the three, as a parameter
        infinite=infinite,
    )
    seen = run(plan, zero_stage=zero_stage, dtype=dtype, checkpoint_every=1)
    assert_step_two_was_skipped(seen)


def test_three_in_a_row_end_the_run_without_another_try(llm: str, tmp_path: Path) -> None:
    plan = Plan(llm=llm, out=str(tmp_path), nan_at=(2, 3, 4), nan_in="loss")
    with pytest.raises(SkippedTooOftenError, match=r"step 5: loss is nan.*last good step is 2"):
        run(plan, max_failures=3)
    assert len((tmp_path / "pids").read_text().split()) == 2  # two ranks, once
    store = open_store(tmp_path / "run")
    for name in checkpoint.names(store):
        assert all(bool(t.isfinite().all()) for t in checkpoint.read(store, name)[1].values())


def test_skipped_steps_are_remembered_over_a_kill(llm: str, tmp_path: Path) -> None:
    """Two before the kill and one after it are three in a row."""
    plan = Plan(llm=llm, out=str(tmp_path), nan_at=(2, 3, 4), nan_in="loss", kill_at=(4,))
    with pytest.raises(SkippedTooOftenError, match=r"step 5: .*last good step is 2"):
        run(plan, checkpoint_every=1)
    assert (tmp_path / "killed-4").exists()


def test_no_false_alarm_in_five_hundred_clean_steps(llm: str, tmp_path: Path) -> None:
    plan = Plan(llm=llm, out=str(tmp_path), steps=500, dropout=0.2)
    seen = run(plan, checkpoint_every=500, num_workers=1, micro_batches=2)
    assert len(seen.steps) == 500
    assert seen.metrics[-1]["skipped_steps"] == 0


def test_without_the_gate_nan_is_learnt(llm: str, tmp_path: Path) -> None:
    """Teeth: with a guard that never objects (planted in the workers) the weights are NaN, and not even exported."""
    plan = Plan(llm=llm, out=str(tmp_path), steps=4, nan_at=(1,), without_gate=True)
    with pytest.raises(Exception, match="is not finite"):
        run(plan, zero_stage=0, checkpoint_every=1, max_failures=0)
    store = open_store(tmp_path / "run")
    _, state = checkpoint.read(store, checkpoint.names(store)[-1])
    assert not all(bool(tensor.isfinite().all()) for tensor in state.values())
