"""A run that is killed and goes on is the run that was never stopped, bit for bit, with dropout."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_training import Plan, Run, TinyRecipe, run, write_llm

from crab_platform import checkpoint
from crab_platform.checkpoint import IncompleteCheckpointError, completed_step
from crab_platform.ray_cluster import connected

pytestmark = pytest.mark.ray

DROPOUT = 0.2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Folder of the LLM; Ray runs as long as it is asked for."""
    with connected(num_cpus=3):
        yield write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def unstopped(llm: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps with a checkpoint after 2, 4 and 6."""
    return run(Plan(llm=llm, out=str(tmp_path_factory.mktemp("unstopped")), dropout=DROPOUT))


@pytest.fixture
def from_checkpoints(unstopped: Run, tmp_path: Path) -> Callable[..., Plan]:
    """A plan whose run finds copies of the checkpoints of these steps, as a run killed later would."""

    def copied(*steps: int, **changes: Any) -> Plan:
        plan = replace(unstopped.plan, out=str(tmp_path), **changes)
        for step in steps:
            source = unstopped.checkpoint(step)
            shutil.copytree(source, tmp_path / "run" / source.name)
        return plan

    return copied


def assert_same(again: Run, unstopped: Run) -> None:
    """Losses, gradient norms and every exported tensor have the same bits."""
    names = ("loss", "gradient_norm", "tokens", "mask_frames", "mask_loss", "learning_rate")
    by_step = {metrics["step"]: metrics for metrics in unstopped.metrics}
    for metrics in again.metrics:
        expected = by_step[metrics["step"]]
        assert [metrics[n] for n in names] == [expected[n] for n in names], metrics["step"]
    mine, theirs = again.exported(), unstopped.exported()
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert different == []


def test_every_step_is_told_once(unstopped: Run) -> None:
    assert unstopped.steps == [1, 2, 3, 4, 5, 6]
    last = {k: v for k, v in unstopped.metrics[-1].items() if k != "seconds_per_step"}
    assert last.items() <= unstopped.result.metrics.items()


def test_masks_are_learnt_beside_text(unstopped: Run) -> None:
    frames = [metrics["mask_frames"] for metrics in unstopped.metrics]
    assert min(frames) == 0  # a step without masks, and some in which only one rank has them
    assert max(frames) > 0
    assert all((m["mask_loss"] > 0) == (m["mask_frames"] > 0) for m in unstopped.metrics)
    fresh = TinyRecipe(unstopped.plan).model.trainable_state_dict()
    exported = unstopped.exported()
    decoder = [name for name in fresh if name.startswith("mask_decoder.")]
    still = [n for n in decoder if torch.equal(fresh[n], exported[f"trained.safetensors:{n}"])]
    assert len(decoder) > 20
    assert still == []


def test_checkpoints_hold_what_is_trained_and_its_optimizer(unstopped: Run) -> None:
    trained = sum(tensor.numel() for tensor in unstopped.exported().values())
    folder = unstopped.checkpoint(6)
    held = sum(_elements(torch.load(f, weights_only=False)) for f in folder.rglob("*.pt"))
    # The weights, their float32 masters and two moments of Adam; ZeRO pads each rank's flat parts.
    assert 3 * trained <= held <= 4.02 * trained
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size <= 4 * 4 * trained + 150_000
    frozen = sum(p.numel() for p in _frozen_llm(unstopped.plan.llm))
    assert frozen > 0.05 * trained  # else the bounds above would not notice it


def test_a_checkpoint_with_a_file_missing_or_wrong_is_none(unstopped: Run, tmp_path: Path) -> None:
    whole = unstopped.checkpoint(4)
    assert completed_step(whole) == 4
    files = [f.relative_to(whole) for f in whole.rglob("*") if f.is_file()]
    assert len(files) >= 6  # two ranks with weights, optimizer and marker each
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(whole, copy)
        content = (copy / name).read_bytes()
        broken = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        for damaged in (content[:-1], broken):
            (copy / name).write_bytes(damaged)
            if name.name.startswith("complete-") and damaged == broken:
                continue  # a digit of a digest: the file it speaks of no longer fits, tested above
            with pytest.raises(IncompleteCheckpointError, match=name.name):
                completed_step(copy)
        (copy / name).unlink()
        with pytest.raises(IncompleteCheckpointError, match=name.name):
            completed_step(copy)


def test_a_killed_worker_changes_nothing(unstopped: Run, tmp_path: Path) -> None:
    killed = run(replace(unstopped.plan, out=str(tmp_path), kill_at=4))
    assert (tmp_path / "killed").exists()
    assert len(_pids(tmp_path)) == 4  # two ranks, twice
    assert killed.steps == [1, 2, 3, 4, 5, 6]  # step 5 was lost, not repeated
    assert_same(killed, unstopped)


def test_a_killed_job_goes_on_where_it_was(unstopped: Run, tmp_path: Path) -> None:
    plan = replace(unstopped.plan, out=str(tmp_path), hold_at=5)
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, repr(plan)], env=_environment())
    _wait(lambda: (tmp_path / "held").exists(), driver)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _wait(lambda: not any(map(_alive, _pids(tmp_path))))
    again = run(plan)
    # Step 5 was done after the last checkpoint, told to a driver that is gone, and is done again.
    assert again.steps == [5, 6]
    assert_same(again, unstopped)


def test_falls_back_to_the_checkpoint_before(
    unstopped: Run, from_checkpoints: Callable[..., Plan]
) -> None:
    plan = from_checkpoints(2, 4)
    (newest,) = (Path(plan.out) / "run").glob("checkpoint_00000004_*")
    file = next(newest.rglob("*rank_1*optim_states.pt"))
    os.truncate(file, file.stat().st_size - 1)
    # What Ray Train leaves when it is killed while it writes its list.
    (newest.parent / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.6')
    again = run(plan)
    assert again.steps == [3, 4, 5, 6]
    assert not newest.exists()
    assert_same(again, unstopped)


def test_a_lost_optimizer_state_is_noticed(
    unstopped: Run, from_checkpoints: Callable[..., Plan]
) -> None:
    """Teeth: what this file compares would show a resume that forgets Adam's moments."""
    plan = from_checkpoints(4)
    (folder,) = (Path(plan.out) / "run").iterdir()
    for file in folder.rglob("*optim_states.pt"):
        state = torch.load(file, weights_only=False)
        for moments in _moments(state):
            moments.zero_()
        torch.save(state, file)
        _own_to(folder, file)
    again = run(plan)
    assert again.steps == [5, 6]
    with pytest.raises(AssertionError):
        assert_same(again, unstopped)


@pytest.mark.slow
@pytest.mark.parametrize("forgets", ["dropout", "data"])
def test_a_lost_cursor_is_noticed(
    unstopped: Run, from_checkpoints: Callable[..., Plan], forgets: str
) -> None:
    """Teeth: a recipe that counts for itself starts again at 0 when its process does."""
    again = run(from_checkpoints(4, forgets=forgets))
    with pytest.raises(AssertionError):
        assert_same(again, unstopped)


@pytest.mark.slow
def test_a_finished_run_is_only_exported_again(
    unstopped: Run, from_checkpoints: Callable[..., Plan]
) -> None:
    again = run(from_checkpoints(6))
    assert again.steps == []
    assert_same(again, unstopped)


@pytest.mark.slow
def test_another_number_of_workers_is_refused(from_checkpoints: Callable[..., Plan]) -> None:
    with pytest.raises(Exception, match=r"world_size 2 \(now 1\)"):
        run(from_checkpoints(4), num_workers=1, micro_batches=2, max_failures=0)


def test_mend_keeps_a_list_that_is_right(tmp_path: Path) -> None:
    name = checkpoint.new_name(3)
    (tmp_path / name).mkdir()
    listed = tmp_path / "checkpoint_manager_snapshot.json"
    listed.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name}]}))
    checkpoint.mend(str(tmp_path))
    assert listed.exists()
    (tmp_path / name).rmdir()
    checkpoint.mend(str(tmp_path))
    assert not listed.exists()


_DRIVER = """
import sys
from support.tiny_training import Plan, run
from crab_platform.ray_cluster import connected
with connected(num_cpus=3):
    run(eval(sys.argv[1]))
"""


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return ours | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}


def _wait(
    condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, patience_s=300
) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, "the process ended by itself"
        time.sleep(0.2)


def _pids(out: Path) -> list[int]:
    return [int(line) for line in (out / "pids").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def _frozen_llm(folder: str) -> list[torch.nn.Parameter]:
    from crab.model.llm import load_llm

    return list(load_llm(folder).parameters())


def _elements(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, dict):
        return sum(map(_elements, value.values()))
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return sum(map(_elements, value))
    return 0


def _moments(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name in ("exp_avg", "exp_avg_sq"):
                yield item
            else:
                yield from _moments(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _moments(item)


def _own_to(folder: Path, file: Path) -> None:
    """Makes the markers agree with a changed file."""
    import blake3

    name = file.relative_to(folder).as_posix()
    for path in folder.glob("complete-*.json"):
        marker = json.loads(path.read_text())
        if name in marker["files"]:
            digest = blake3.blake3(file.read_bytes()).hexdigest()
            marker["files"][name] = [file.stat().st_size, digest]
            path.write_text(json.dumps(marker))
