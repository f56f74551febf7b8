"""MLflow runs in a real sqlite file."""

import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from crab_platform.mlflow_records import Refused
from crab_platform.tracking import flatten, start_run

DIGEST = "a1" * 32


def test_a_run_holds_spec_commit_data_metrics_and_files(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/deep/mlflow.db"
    note = tmp_path / "note.txt"
    note.write_text("hello")
    spec = {"a": {"b": 1, "c": [1, 2]}, "d": "x" * 7000, "n=1": 3}
    with start_run(uri, "experiment", "name", spec=spec, tags={"identity": "i"}) as run:
        run.metrics({"loss": 2.0}, step=1)
        run.metrics({"loss": 1.0, "loss/ave": 0.5}, step=2)
        run.dataset("shapes", DIGEST, "s3://bucket/manifests/x.parquet")
        run.file(note)
    client = MlflowClient(uri)
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["a.b"] == "1"
    assert found.data.params["n_1"] == "3", "MLflow takes no equals sign"
    assert len(found.data.params["d"]) == 6000
    assert found.data.metrics == {"loss": 1.0, "loss/ave": 0.5}
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [2.0, 1.0]
    assert found.data.tags["identity"] == "i"
    assert found.data.tags["git.commit"]
    (dataset,) = found.inputs.dataset_inputs
    assert dataset.dataset.name == "shapes"
    assert {tag.key: tag.value for tag in dataset.tags}["manifest"] == DIGEST
    assert {item.path for item in client.list_artifacts(run.run_id)} == {"note.txt", "spec.yaml"}
    assert list(tmp_path.glob("deep/mlartifacts/**/note.txt"))


def test_an_adapter_is_a_model_of_its_run(tmp_path: Path) -> None:
    """Twice the same, as after a lost answer, is one model."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_text("w")
    with start_run(uri, "experiment", "name", spec={}) as run:
        with pytest.raises(Refused, match="is gone"):
            run.model("train", tmp_path / "absent", {})
        run.model("train", adapter, {"num_heads": "3"}, step=7)
        run.model("train", adapter, {"num_heads": "3"}, step=7)
    client = MlflowClient(uri)
    found = client.get_run(run.run_id)
    (model,) = client.search_logged_models([found.info.experiment_id])
    assert model.status == LoggedModelStatus.READY
    assert model.name == "train"
    assert model.params == {"num_heads": "3"}
    assert model.source_run_id == run.run_id
    (output,) = found.outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 7)
    assert list(tmp_path.glob(f"mlartifacts/**/{model.model_id}/**/weights"))


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_ends_badly_says_so(tmp_path: Path, error: BaseException, status: str) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(type(error)), start_run(uri, "e", "n", spec={}) as run:
        raise error
    assert MlflowClient(uri).get_run(run.run_id).info.status == status
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        rows = database.execute("select count(*) from runs where status = 'RUNNING'").fetchall()
    assert rows == [(0,)]


def test_names_of_nested_values() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": "1", "d": "None"}
