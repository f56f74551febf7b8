"""B12: the driver of a train job, or Ray Train's controller, is killed five times; the same command goes on each time.

At the end there is one run in MLflow, and what was learnt has the bits of a job that nobody killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file
from support.crab_runs import CLI, CrabRun, kill, ray_home, wait_for
from torch import equal

pytestmark = [pytest.mark.ray, pytest.mark.faults]

KILLS = ("driver", "controller", "driver", "controller", "driver")
EVERY = 2
STEPS = EVERY * (len(KILLS) + 2)


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with ray_home() as variables:
        yield variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> Path:
    """A folder with clips of all tasks and their features."""
    path = tmp_path_factory.mktemp("driver-kills")
    job(path, env, "synth", {"job": "synth", "name": "clips", "out": f"{path}/shapes", "clips": 16})
    wanted = yaml.safe_load(Path("jobs/specs/preprocess-shapes.yaml").read_text())
    job(path, env, "preprocess", wanted | places(path) | {"cache": f"{path}/cache"})
    return path


def places(path: Path) -> dict[str, Any]:
    return {
        "data": [{"name": "shapes", "samples": f"{path}/shapes/samples.jsonl"}],
        "runs": f"{path}/runs",
        "tracking": {"uri": f"sqlite:///{path}/mlflow.db"},
    }


def job(path: Path, env: dict[str, str], name: str, spec: dict[str, Any]) -> Any:
    file = path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec))
    return CrabRun(["run", str(file), "--json"], env, path).finish()


def train(path: Path, env: dict[str, str], name: str, code: str = CLI) -> CrabRun:
    spec = yaml.safe_load(Path("jobs/specs/train-shapes.yaml").read_text())
    spec |= places(path) | {"name": name, "parse_rate_samples": 0}
    spec["features"] = {"cache": f"{path}/cache", "manifest": "preprocess-shapes"}
    spec["optimisation"] |= {"steps": STEPS, "batch_size": 4}
    spec["workers"] |= {"checkpoint_every": EVERY, "zero_stage": 3}
    file = path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(spec))
    return CrabRun(["run", str(file), "--json"], env, path, code)


def newest(path: Path, name: str = "killed") -> int:
    """Step of the newest checkpoint of a run; 0 when there is none."""
    names = (
        p.parent.name for p in (path / "runs").glob(f"{name}/*/ray/checkpoint_*/complete.json")
    )
    return max((int(name.split("_")[1]) for name in names), default=0)


def ended(run: CrabRun) -> bool:
    try:
        return not run.is_running()
    except AssertionError:  # it was killed, or failed
        return True


def has_learnt(run: CrabRun, path: Path, step: int) -> None:
    """Waits for a checkpoint after `step`."""
    wait_for(lambda: not run.is_running() or newest(path) > step, f"a checkpoint after step {step}")
    assert run.is_running(), "it ended before it could be killed"


def all_ended(run: CrabRun) -> None:
    wait_for(lambda: not run.processes(), "the end of what the driver had started")


def goes_on_or_ends(run: CrabRun, path: Path, step: int) -> None:
    """Without its controller: Ray makes another one, or the job fails."""
    wait_for(lambda: ended(run) or newest(path) > step, "a run without controller")


def controllers(run: CrabRun) -> list[psutil.Process]:
    found = []
    for process in run.processes():
        try:
            if "TrainController" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def learnt(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    adapter = Path(result["adapter"])
    steps: dict[int, dict[str, float]] = {}
    for line in (adapter.parent / "steps.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps[int(record["step"])] = record
    assert sorted(steps) == list(range(1, STEPS + 1))
    return {
        "losses": [steps[n]["loss"] for n in sorted(steps)],
        "norms": [steps[n]["gradient_norm"] for n in sorted(steps)],
        "weights": {
            f"{file.name}:{name}": tensor
            for file in sorted(adapter.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        },
    }


def runs_named(folder: Path, name: str) -> list[Any]:
    """MLflow's."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return [run for run in runs if run.info.run_name == name]


def test_the_same_command_goes_on_after_every_kill(
    folder: Path, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    unkilled = learnt(folder, train(folder, env, "unkilled").finish())
    starts = 1
    run = train(folder, env, "killed")
    try:
        for number, victim in enumerate(KILLS):
            has_learnt(run, folder, EVERY * number)
            if victim == "driver":
                run.kill()
                all_ended(run)
            else:
                before = newest(folder)
                assert [kill(process) for process in controllers(run)]
                goes_on_or_ends(run, folder, before)
            if ended(run):
                run, starts = train(folder, env, "killed"), starts + 1
        result = run.finish()
        assert "killed: goes on after step " in run.stderr(), (
            "who starts it again is told where it goes on"
        )
    finally:
        run.end_all()
    killed = learnt(folder, result)
    assert killed["losses"] == unkilled["losses"]
    assert killed["norms"] == unkilled["norms"]
    assert killed["weights"].keys() == unkilled["weights"].keys()
    assert all(equal(killed["weights"][n], t) for n, t in unkilled["weights"].items())
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (ours,) = runs_named(folder, "killed")
    assert ours.info.status == "FINISHED"
    history = client.get_metric_history(ours.info.run_id, "loss")
    assert [m.step for m in history] == list(range(1, STEPS + 1))
    assert [m.value for m in history] == unkilled["losses"]
    with capsys.disabled():
        print(f"\nB12: {len(KILLS)} kills ({', '.join(KILLS)}), {starts} starts, one MLflow run")


_ALWAYS_ANEW = """
from crab_platform import tracking
start = tracking.start_run
tracking.start_run = lambda *args, **kwargs: start(*args, **(kwargs | {"resume": None}))
from jobs.cli import main
main()
"""


def test_a_job_that_forgets_its_mlflow_run_is_noticed(folder: Path, env: dict[str, str]) -> None:
    """Teeth: a job that never looks for its run of before (planted) has two in MLflow after one kill."""
    run = train(folder, env, "forgetful", _ALWAYS_ANEW)
    try:
        wait_for(lambda: newest(folder, "forgetful") > 0, "a checkpoint")
        run.kill()
        all_ended(run)
        run = train(folder, env, "forgetful", _ALWAYS_ANEW)
        run.finish()
    finally:
        run.end_all()
    assert len(runs_named(folder, "forgetful")) == 2
