"""A run that is killed and goes on is the run that was never stopped, bit for bit, with dropout."""

from __future__ import annotations

import json
import os
import random
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
import safetensors
import safetensors.torch
import torch
from support.tiny_training import Plan, Run, TinyRecipe, run, write_llm

from crab_platform import checkpoint
from crab_platform.checkpoint import IncompleteCheckpointError
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store

pytestmark = pytest.mark.ray

DROPOUT = 0.2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Folder of the LLM; Ray runs as long as it is asked for."""
    with connected(num_cpus=5):
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
    names = (
        "loss",
        "gradient_norm",
        "samples",
        "tokens",
        "mask_frames",
        "mask_loss",
        "learning_rate",
    )
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
    exported = {name.partition(":")[2]: t for name, t in unstopped.exported().items()}
    marker, state = checkpoint.read(open_store(unstopped.folder), unstopped.checkpoint(6).name)
    assert (marker.step, marker.adam_step) == (6, 6)
    kinds = {name.partition("/")[0] for name in state}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
    trained = sum(tensor.numel() for tensor in exported.values())
    assert sum(tensor.numel() for tensor in state.values()) == 3 * trained
    assert all((state[name] != 0).any() for name in state if name.startswith("exp_avg_sq/"))
    size = sum(f.stat().st_size for f in unstopped.checkpoint(6).iterdir())
    names = sum(2 * len(name) + 200 for name in state)  # in the header, with shapes and offsets
    assert size <= 3 * 4 * trained + names


def damages(content: bytes) -> Iterator[bytes]:
    """Cut short, emptied, longer, and with one bit flipped: at each place of a small file, at 100 of a large one."""
    yield content[:-1]
    yield content[: len(content) // 2]
    yield b""
    yield content + b" "
    places = range(len(content))
    for at in [*random.Random(3).sample(places, min(len(content), 100)), 0, len(content) - 1]:
        yield content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def accepted_damages(copy: Path, read: Callable[[str], object]) -> dict[str, list[str]]:
    """File -> what `read` said of each damage to it: nothing, where it took the checkpoint for whole."""
    said: dict[str, list[str]] = {}
    for file in sorted(copy.iterdir()):
        content = file.read_bytes()
        for damaged in (*damages(content), None):
            file.unlink(missing_ok=True)
            if damaged is not None:
                file.write_bytes(damaged)
            try:
                read(copy.name)
                said.setdefault(file.name, []).append("")
            except IncompleteCheckpointError as error:
                said.setdefault(file.name, []).append(str(error))
        file.write_bytes(content)
    return said


def test_a_checkpoint_with_a_file_missing_or_wrong_is_none(unstopped: Run, tmp_path: Path) -> None:
    """B3: all damages are refused, by the name of the file."""
    copy = tmp_path / unstopped.checkpoint(4).name
    shutil.copytree(unstopped.checkpoint(4), copy)
    store = open_store(tmp_path)
    said = accepted_damages(copy, lambda name: checkpoint.read(store, name))
    assert len(said) >= 2  # the state and the marker
    for file, words in said.items():
        assert len(words) > 100
        assert [w for w in words if file not in w] == []
    assert checkpoint.read(store, copy.name)[0].step == 4  # it was the damage that was refused


def test_a_reader_that_trusts_sizes_is_noticed(unstopped: Run, tmp_path: Path) -> None:
    """Teeth: what DeepSpeed and torch.load do, to read what is there, lets flipped bits through."""
    copy = tmp_path / unstopped.checkpoint(4).name
    shutil.copytree(unstopped.checkpoint(4), copy)

    def trusting(name: str) -> None:
        try:
            json.loads((copy / checkpoint.COMPLETE).read_text())
            for file in copy.glob("state-*"):
                safetensors.torch.load_file(file)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise IncompleteCheckpointError(str(error)) from error

    said = accepted_damages(copy, trusting)
    assert all("" in words for words in said.values())


def test_files_of_two_checkpoints_do_not_make_one(unstopped: Run, tmp_path: Path) -> None:
    mixed = tmp_path / unstopped.checkpoint(4).name
    shutil.copytree(unstopped.checkpoint(4), mixed)
    (file,) = unstopped.checkpoint(6).glob("state-*")
    shutil.copy(file, mixed)
    with pytest.raises(IncompleteCheckpointError, match="other bytes"):
        checkpoint.read(open_store(tmp_path), mixed.name)
    renamed = mixed.with_name(checkpoint.new_name(5))
    shutil.copytree(unstopped.checkpoint(4), renamed)
    with pytest.raises(IncompleteCheckpointError, match="step 4"):
        checkpoint.read(open_store(tmp_path), renamed.name)


def test_a_killed_worker_changes_nothing(unstopped: Run, tmp_path: Path) -> None:
    killed = run(replace(unstopped.plan, out=str(tmp_path), kill_at=(4,)))
    assert (tmp_path / "killed-4").exists()
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
    (file,) = newest.glob("state-*")
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
    store = open_store(Path(plan.out) / "run")
    (name,) = checkpoint.names(store)
    marker, state = checkpoint.read(store, name)
    for key, tensor in state.items():
        if key.startswith("exp_avg"):
            tensor.zero_()
    checkpoint.remove(store, [name])
    checkpoint.write(store, name, state, marker)
    again = run(plan)
    assert again.steps == [5, 6]
    with pytest.raises(AssertionError):
        assert_same(again, unstopped)


@pytest.mark.slow
@pytest.mark.parametrize("forgets", ["dropout", "data", "schedule"])
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


def test_other_parts_are_refused(from_checkpoints: Callable[..., Plan]) -> None:
    with pytest.raises(Exception, match=r"workers x micro_batches 2 \(now 4\)"):
        run(from_checkpoints(4, parts=4), micro_batches=2, max_failures=0)


def test_other_data_is_refused_until_it_is_allowed(
    unstopped: Run, from_checkpoints: Callable[..., Plan]
) -> None:
    plan = from_checkpoints(4, data="another")
    with pytest.raises(Exception, match=r"data has changed since .*step 4.*changed_data=continue"):
        run(plan, max_failures=0)
    again = run(plan, changed_data="continue")
    assert again.steps == [5, 6]
    assert_same(again, unstopped)


def test_old_checkpoints_are_removed(unstopped: Run, from_checkpoints: Callable[..., Plan]) -> None:
    plan = from_checkpoints(2)
    left_over = Path(plan.out) / "run" / checkpoint.new_name(1)
    left_over.mkdir()
    (left_over / "state-00001-of-00001.safetensors").write_bytes(b"cut short")
    again = run(plan, keep_checkpoints=1)
    assert checkpoint.names(open_store(again.folder)) == [again.checkpoint(6).name]


def test_mend_keeps_a_list_that_is_right(tmp_path: Path) -> None:
    listed = tmp_path / "checkpoint_manager_snapshot.json"
    listed.write_text(json.dumps({"checkpoint_results": []}))
    checkpoint.mend(open_store(tmp_path))
    assert listed.exists()
    listed.write_text('{"checkpoint_results"')
    checkpoint.mend(open_store(tmp_path))
    assert not listed.exists()


_DRIVER = """
import sys
from support.tiny_training import Plan, run
from crab_platform.ray_cluster import connected
from crab_platform.storage import open_store
with connected(num_cpus=5):
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
