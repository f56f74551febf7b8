"""B1, B2, B7: workers are killed while they train and while they write checkpoints; the run learns the same bits."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import crash_points
from support.tiny_training import Plan, Run, run, write_llm

from crab_platform import checkpoint
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.faults]

KILLS = 10
EVERY = 3
CRASHES = 60


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with connected(num_cpus=3):
        yield write_llm(tmp_path_factory.mktemp("llm"))


def differing(one: Run, other: Run) -> list[str]:
    """Names of steps and exported tensors that have not the same bits in both runs, to the number of all compared."""
    names = ("loss", "gradient_norm", "learning_rate", "samples", "tokens", "mask_loss")
    found = []
    for mine, theirs in zip(one.metrics, other.metrics, strict=True):
        found += [f"step {mine['step']}: {n}" for n in names if mine[n] != theirs[n]]
    mine, theirs = one.exported(), other.exported()
    assert mine.keys() == theirs.keys()
    return found + [name for name in mine if not torch.equal(mine[name], theirs[name])]


def test_ten_kills_and_not_one_differing_bit(
    llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = tuple(sorted(random.Random(5).sample(range(1, 40), KILLS)))
    plan = Plan(llm=llm, out=str(tmp_path / "unstopped"), dropout=0.2, steps=40, step_s=0.1)
    unstopped = run(plan, checkpoint_every=EVERY)
    at: dict[int, float] = {}
    killed_plan = replace(plan, out=str(tmp_path / "killed"), kill_at=kills)
    killed = run(
        killed_plan,
        checkpoint_every=EVERY,
        max_failures=KILLS,
        on_step=lambda step: at.setdefault(step, time.time()),
    )
    died = {k: (tmp_path / "killed" / f"killed-{k}").stat().st_mtime for k in kills}
    assert len(died) == KILLS
    assert differing(killed, unstopped) == []
    lost = [kill - again for kill, again in zip(kills, killed.began[1:], strict=True)]
    assert max(lost) <= EVERY
    # What was told before a kill is not told again: the next news is of a step that was never done before it.
    gaps = [min(t for t in at.values() if t > when) - when for when in died.values()]
    with capsys.disabled():
        print(
            f"\nB1: {KILLS} kills before steps {kills}, 0 differing bits in {len(killed.steps)} steps"
            f"\nB7: next new step after {min(gaps):.1f} to {max(gaps):.1f} s, at most {max(lost)} steps done again "
            f"(a checkpoint every {EVERY})"
        )


def test_a_run_without_checkpoints_loses_more(llm: str, tmp_path: Path) -> None:
    """Teeth of B7: what is done again is seen in the step that a start begins with."""
    plan = Plan(llm=llm, out=str(tmp_path), dropout=0.2, steps=EVERY + 4, kill_at=(EVERY + 2,))
    killed = run(plan, checkpoint_every=1000)
    assert killed.began == [0, 0]


def test_sixty_crash_points_in_saves_and_sixty_resumes(
    llm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crashes, steps = CRASHES, 3 * CRASHES
    plan = Plan(llm=llm, out=str(tmp_path / "unstopped"), dropout=0.2, steps=steps)
    unstopped = run(plan, checkpoint_every=steps)
    crashed_plan = replace(plan, out=str(tmp_path / "crashed"), crashes=crashes)
    crashed = run(crashed_plan, checkpoint_every=1, keep_checkpoints=2, max_failures=2 * crashes)
    points = [p.read_text() for p in sorted((tmp_path / "crashed" / "crashes").iterdir())]
    assert len(points) == crashes
    resumes = [
        json.loads(line) for line in (tmp_path / "crashed" / "resumed").read_text().splitlines()
    ]
    assert len(resumes) >= crashes + 1
    assert [r for r in resumes if r["step"] != r["newest"]] == []
    assert differing(crashed, unstopped) == []
    # Nothing of the crashes is left but two whole checkpoints, and files that a writer died with aside.
    store = open_store(crashed.folder)
    assert [checkpoint.read(store, name)[0].step for name in checkpoint.names(store)] == [
        steps - 1,
        steps,
    ]
    kinds = {p.partition(" ")[0] for p in points}
    assert kinds >= {"open", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
    with capsys.disabled():
        print(
            f"\nB2: {crashes} crashes at {len(set(kinds))} kinds of boundaries, {len(resumes) - 1} resumes"
        )


def test_a_marker_before_its_data_is_noticed(tmp_path: Path) -> None:
    """Teeth of B2: what a writer that writes the marker first leaves when it dies is no checkpoint, neither by the rule
    of the test nor by `newest`."""
    store = open_store(tmp_path / "run")
    for step in (1, 2):
        marker = checkpoint.Marker(
            step=step, adam_step=1, layout={}, data="d", guard={}, metrics={}
        )
        checkpoint.write(store, checkpoint.new_name(step), {"weight/a": torch.ones(3)}, marker)
    assert crash_points.newest_whole(tmp_path / "run") == 2
    (early,) = (tmp_path / "run").glob("checkpoint_00000002_*")
    (data,) = early.glob("state-*")
    data.unlink()
    assert crash_points.newest_whole(tmp_path / "run") == 1
    found = checkpoint.newest(store, {}, "d")
    assert found is not None
    assert found[1].step == 1
