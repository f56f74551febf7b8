"""`job: tune` on a small Crab and random features: from samples to an adapter that a train job would have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file
from support.random_features import Job, write_job
from torch import equal

from crab.model.artifact import verify_model
from crab_platform import ray_cluster
from jobs.run import run_spec
from jobs.spec import SpecError, TuneSpec, parse_spec, spec_record

pytestmark = pytest.mark.ray

STEPS, EVERY = 6, 2
COMPARE = {"num_heads": 1, "router_temperature": 1.0}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("tune")
    workers = {"count": 1, "micro_batches": 1, "zero_stage": 0}
    return write_job(folder, str(folder / "cache"), count=60, steps=STEPS, workers=workers)


def values(job: Job, **changes: Any) -> dict[str, Any]:
    train = spec_record(job.spec)
    for name in ("job", "name", "runs", "tracking"):
        del train[name]
    train["tasks"] = ["avqa", "s4"]  # the answers of the others are not in their grammar
    train["validation"] = {"samples_per_task": 2, "every": EVERY}
    folder = job.adapter.parent
    return {
        "job": "tune",
        "name": "heads",
        "runs": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db", "experiment": "tune"},
        "space": ["heads_and_temperature"],
        "train": train,
        "search": {"samples": 5, "grace_steps": 2, "reduction_factor": 2},
        "confirm": {"seeds": 2, "compare": {"n=1": COMPARE}},
    } | changes


def spec_of(record: dict[str, Any]) -> TuneSpec:
    spec = parse_spec(record)
    assert isinstance(spec, TuneSpec)
    return spec


@pytest.fixture(scope="module")
def swept(job: Job) -> dict[str, Any]:
    with ray_cluster.connected(2):
        return run_spec(spec_of(values(job)))


def test_every_trial_is_told_with_its_curve_and_its_end(job: Job, swept: dict[str, Any]) -> None:
    sweep = json.loads(Path(swept["sweep"]).read_text())
    assert [trial["number"] for trial in sweep["trials"]] == list(range(5))
    for trial in sweep["trials"]:
        assert trial["status"] in ("completed", "stopped")
        assert [step for step, _ in trial["curve"]] == list(range(EVERY, trial["steps"] + 1, EVERY))
        assert trial["parameters"] > 1000
        assert trial["seconds"] > 0
    assert sweep["space"]["num_heads"] == {"kind": "int", "low": 1, "high": 8, "log": False}
    completed = [t for t in sweep["trials"] if t["status"] == "completed"]
    winner = min(completed, key=lambda trial: trial["last"])
    assert swept["winner"] == winner["config"]
    assert Path(swept["report"]).is_file()


def test_the_winner_and_its_rival_were_trained_on_two_seeds(swept: dict[str, Any]) -> None:
    winner, rival = swept["confirmed"]
    assert (winner["label"], winner["config"]) == ("winner", swept["winner"])
    assert (rival["label"], rival["config"]) == ("n=1", COMPARE)
    for setting in (winner, rival):
        assert len(setting["values"]) == 2
        assert setting["mean"] == pytest.approx(sum(setting["values"]) / 2)
        assert setting["std"] > 0, "another seed learns the same"
        assert setting["failed"] == 0


def test_the_adapter_is_the_one_that_a_train_job_makes(job: Job, swept: dict[str, Any]) -> None:
    """Bit for bit: trials are trained in processes that were used before, a train job by Ray Train."""
    verify_model(swept["adapter"])
    winner = swept["confirmed"][0]
    seed = winner["seeds"][winner["values"].index(min(winner["values"]))]
    record = values(job)["train"] | {
        "job": "train",
        "name": "alone",
        "runs": str(job.adapter.parent / "runs"),
        "tracking": values(job)["tracking"],
    }
    record["optimisation"]["seed"] = seed
    record["model"]["set"] = {"adapter": swept["winner"]}
    with ray_cluster.connected(2):
        alone = run_spec(parse_spec(record))
    assert alone["metrics"]["val/loss"] == min(winner["values"])
    for file in ("trained.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(Path(run["adapter"]) / file) for run in (swept, alone))
        assert ours.keys() == theirs.keys()
        assert all(equal(ours[name], theirs[name]) for name in ours), file


def test_mlflow_has_a_run_for_each_trial_below_that_of_the_sweep(
    job: Job, swept: dict[str, Any]
) -> None:
    client = MlflowClient(values(job)["tracking"]["uri"])
    experiment = client.get_experiment_by_name("tune")
    runs = client.search_runs([experiment.experiment_id])
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == swept["mlflow_run"]]
    assert len(children) == 5 + 2 * 2
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.tags["status"] for run in children} <= {"completed", "stopped"}
    for run in children:
        assert "val/loss" in run.data.metrics
        assert run.data.params["sample.num_heads"] == run.data.params["model.set.adapter.num_heads"]
    parent = client.get_run(swept["mlflow_run"])
    assert parent.data.metrics["confirmed/winner/mean"] == swept["confirmed"][0]["mean"]


def test_a_population_learns_in_pieces_what_it_would_learn_in_one(job: Job) -> None:
    """Its rival, trained again in three pieces by processes that trained others between them, has the loss of the
    sweep's rival before, bit for bit. The winner's way is the one that the search has found."""
    with ray_cluster.connected(2):
        whole = run_spec(spec_of(values(job, confirm={"seeds": 2, "compare": {"n=1": COMPARE}})))
        found = run_spec(
            spec_of(
                values(
                    job,
                    name="population",
                    space=["heads_and_temperature", "optim"],
                    search={"scheduler": "pbt", "samples": 4, "interval": 2},
                    confirm={"seeds": 2, "compare": {"n=1": COMPARE}},
                )
            )
        )
    rivals = [result["confirmed"][1] for result in (whole, found)]
    assert rivals[0]["values"] == rivals[1]["values"]
    sweep = json.loads(Path(found["sweep"]).read_text())
    trials = sweep["trials"]
    assert [trial["steps"] for trial in trials] == [2] * 4 + [4] * 4 + [6] * 4
    changed = 0
    for trial in trials[4:]:
        before = trials[trial["parent"]]
        assert before["steps"] == trial["steps"] - 2
        assert trial["config"]["num_heads"] == before["config"]["num_heads"]
        changed += trial["config"] != before["config"]
    assert changed == 2, "one of four in each of two generations"
    best = min(trials[8:], key=lambda trial: trial["last"])
    assert found["winner"] == best["config"]
    assert len(found["confirmed"][0]["values"]) == 2
    verify_model(found["adapter"])
    assert not list(Path(found["sweep"]).parent.rglob("trials/*/state/*/complete.json"))


def test_what_is_done_is_not_done_again(job: Job, swept: dict[str, Any]) -> None:
    assert run_spec(spec_of(values(job))) == swept


def test_a_cold_cache_is_refused_and_the_error_says_how(job: Job) -> None:
    cold = values(job)
    cold["train"]["features"]["manifest"] = "nobody-made-this"
    with pytest.raises(SpecError, match=r"cold cache.*preprocess="):
        run_spec(spec_of(cold))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"grace_steps": STEPS + 1}}, "grace_steps"),
        ({"budget": {"money": 1}}, "prices"),
        ({"search": {"scheduler": "pbt", "samples": 4}}, "needs search.interval"),
        ({"search": {"scheduler": "pbt", "samples": 4, "interval": 3}}, "validation.every"),
        ({"search": {"scheduler": "pbt", "samples": 1, "interval": 2}}, "two at least"),
        ({"search": {"interval": 2, "grace_steps": 2}}, "of scheduler pbt only"),
        ({"confirm": {"compare": {"winner": {"num_heads": 1}}}}, "winner"),
        ({"space": ["heads_and_temperatur"]}, "heads_and_temperature"),
        ({"search": {"grace_steps": 2, "first": [{"num_heads": 99}]}}, "num_heads"),
        ({"confirm": {"compare": {"n=0": {"num_heads": 0}}}}, "num_heads"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    job: Job, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        run_spec(spec_of(values(job, name="wrong", **changes)))
    assert not list((job.adapter.parent / "runs" / "wrong").glob("*/search/trials"))
