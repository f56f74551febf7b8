"""`crab replay`, beside a job whose server was not there."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers.mlflow_server import mlflow_server
from servers.seaweedfs import free_ports
from support.spooled import end_record, first_record, metrics_record, write_spool
from typer.testing import CliRunner

from crab_platform.spool import FOLDER, spools
from crab_platform.tracking import start_run
from jobs.cli import app


def test_a_job_without_a_server_and_its_replay(tmp_path: Path) -> None:
    """A failed job and a good one in two folders; both are there afterwards, each under the id that it had."""
    with mlflow_server(tmp_path / "server") as server:
        server.kill()
        with start_run(server.url, "e", "good", spec={"a": 1}, folder=tmp_path / "good") as good:
            good.metrics({"loss": 1.0}, 1)
            pickle.loads(pickle.dumps(good)).metrics({"loss": 2.0}, 2)  # as another process would
        with (
            pytest.raises(RuntimeError),
            start_run(server.url, "e", "bad", spec={"a": 1}, folder=tmp_path / "bad") as bad,
        ):
            raise RuntimeError("broken")
        failed = CliRunner().invoke(app, ["replay", str(tmp_path), "--give-up-s", "0", "--json"])
        assert failed.exit_code == 3
        assert len(json.loads(failed.stdout)["left"]) == 2
        server.start()
        done = CliRunner().invoke(app, ["replay", str(tmp_path), "--json"])
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert (result["left"], result["refused"], result["damaged"]) == ([], 0, 0)
        client = MlflowClient(server.url)
        for run, status in ((good, "FINISHED"), (bad, "FAILED")):
            (found,) = client.search_runs(["1"], f"tags.`crab.run` LIKE '%{run.run_id}%'")
            assert found.info.status == status
            assert found.data.params == {"a": "1"}
        (found,) = client.search_runs(["1"], f"tags.`crab.run` LIKE '%{good.run_id}%'")
        held = client.get_metric_history(found.info.run_id, "loss")
        assert [(metric.step, metric.value) for metric in held] == [(1, 1.0), (2, 2.0)]
        with pytest.raises(OSError, match="Bad file descriptor"):
            good.metrics({"loss": 3.0}, 3)  # it is over
        again = CliRunner().invoke(app, ["replay", str(tmp_path), "--json"])
        assert json.loads(again.stdout)["delivered"] == 0


def test_the_next_start_brings_what_was_left(tmp_path: Path) -> None:
    with mlflow_server(tmp_path / "server") as server:
        records = [
            first_record(server.url, "earlier", experiment="e"),
            metrics_record(0),
            end_record(),
        ]
        write_spool(tmp_path / "run" / FOLDER, records)
        with start_run(server.url, "e", "n", spec={}, folder=tmp_path / "run") as run:
            pass
        CliRunner().invoke(app, ["replay", str(tmp_path)])  # if this machine was too slow
        found = MlflowClient(server.url).search_runs(["1"], order_by=["attributes.start_time"])
        assert [one.info.status for one in found] == ["FINISHED", "FINISHED"]
        assert found[0].data.tags["crab.run"] == "earlier"
        assert run.run_id in (found[1].info.run_id, found[1].data.tags["crab.run"])
        assert spools(tmp_path / "run" / FOLDER) == []


@pytest.mark.parametrize("identity", ["same", "other"])
def test_a_sqlite_run_goes_on_when_it_is_the_same(tmp_path: Path, identity: str) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with pytest.raises(RuntimeError, match="broken"):  # noqa: PT012 (the run's block is what raises)
        with start_run(uri, "e", "n", spec={"a": 1}, resume="same") as first:
            for step in range(5):
                first.metrics({"loss": 1.0}, step)
            raise RuntimeError("broken")
    with start_run(uri, "e", "n", spec={"a": 2, "b": 3}, resume=identity) as second:
        for step in range(3, 8):
            second.metrics({"loss": 2.0}, step)
    client = MlflowClient(uri)
    assert (second.run_id == first.run_id) == (identity == "same")
    held = client.get_metric_history(second.run_id, "loss")
    assert [metric.step for metric in held] == list(range(0 if identity == "same" else 3, 8))
    assert client.get_run(second.run_id).info.status == "FINISHED"
    with start_run(uri, "e", "n", spec={}, resume="same") as third:
        pass
    if identity == "same":  # what is finished is not gone on with
        assert third.run_id != first.run_id
    else:
        assert third.run_id == first.run_id


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["replay", str(tmp_path / "none")])
    assert "is not a folder" in str(result.exception)


def test_a_server_that_is_not_there_is_told_once_at_the_start_and_once_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (port,) = free_ports(1)
    uri = f"http://ann:secret@127.0.0.1:{port}"
    with start_run(uri, "e", "n", spec={}, folder=tmp_path / "run"):
        pass
    said = [record.getMessage() for record in caplog.records if "MLflow" in record.getMessage()]
    assert len(said) == 2
    assert f"crab replay {tmp_path / 'run'}" in said[1]
    assert "secret" not in "".join(said)
