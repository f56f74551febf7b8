"""Trials in one process, one after the other, learn what each would learn in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.random_features import Job, write_job

from crab_platform.session import Session
from crab_platform.storage import open_store
from crab_platform.training_config import Recipe, TrainingConfig
from jobs.recipe import CrabRecipe
from jobs.spec import TrainSpec, parse_spec, spec_record

STEPS = 3
SAMPLES: tuple[dict[str, Any], ...] = (
    {"num_heads": 3, "router_temperature": 1.0, "r": 8},
    {"num_heads": 1, "router_temperature": 4.0, "r": 8},
    {"num_heads": 6, "router_temperature": 0.2, "r": 2},
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("job")
    return write_job(
        folder, str(folder / "cache"), count=60, steps=STEPS, workers={"count": 1, "zero_stage": 0}
    )


def build(job: Job, sample: Mapping[str, Any], before: Recipe | None) -> CrabRecipe:
    record = spec_record(job.spec)
    record["model"]["set"] = {"adapter": dict(sample)}
    record["validation"] = {"samples_per_task": 2, "every": 1}
    spec = parse_spec(record)
    assert isinstance(spec, TrainSpec)
    assert before is None or isinstance(before, CrabRecipe)
    return CrabRecipe(spec, job.manifest, job.adapter, {}, before)


def learn(session: Session, sample: Mapping[str, Any], folder: Path) -> list[float]:
    """Losses of every step and on what is held out."""
    learner = session.begin(sample, open_store(folder))
    found: list[float] = []
    while learner.step < STEPS:
        found += [learner.learn()["loss"], learner.validate()["val/loss"]]
        session.save(open_store(folder))
    return found


def session_of(job: Job) -> Session:
    return Session(
        lambda sample, before: build(job, sample, before), TrainingConfig(name="", storage_path="")
    )


ALONE = """
import json, sys
from pathlib import Path
import test_session as t
from support.random_features import write_job
folder, out, sample = sys.argv[1:]
folder = Path(folder)
job = write_job(folder, str(folder / "cache"), count=60, steps=t.STEPS, workers={"count": 1, "zero_stage": 0})
print(json.dumps(t.learn(t.session_of(job), json.loads(sample), Path(out))))
"""


def test_a_reused_session_learns_bit_for_bit_what_a_new_process_learns(
    job: Job, tmp_path: Path
) -> None:
    import json

    session = session_of(job)
    reused = [learn(session, sample, tmp_path / str(n)) for n, sample in enumerate(SAMPLES)]
    again = learn(session, SAMPLES[0], tmp_path / "again")

    assert again == reused[0], "the trials between left something behind"
    assert len({tuple(losses) for losses in reused}) == len(SAMPLES), "samples make no difference"
    alone = subprocess.run(
        [
            sys.executable,
            "-c",
            ALONE,
            str(tmp_path / "job"),
            str(tmp_path / "alone"),
            json.dumps(SAMPLES[2]),
        ],
        env={
            **__import__("os").environ,
            "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(alone.stdout.splitlines()[-1]) == reused[2]
