"""What each record means to MLflow, done so that doing it again changes nothing.

run      found by our own id in the tag `crab.run`, else created; with `resume` the newest of that identity
metrics  one value for each (run, key, step): the first that came; asked back from the server on any doubt
params, text, tag, dataset, file, model, end      the same twice is the same as once
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException, RestException

from crab_platform.spool import Record

ID_TAG = "crab.run"
"""Tag of every run: the id that was made here before any server knew it; several, with spaces between, when resumed."""
IDENTITY_TAG = "identity"

MOST_METRICS = 1000
_MOST_PARAMS = 100
"""So many MLflow takes in one request."""
_MOST_IDS = 100
"""An id is 33 characters, the value of a tag at most 5,000."""

_FINAL = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
"""Answers of MLflow itself that will be the same next time. A proxy's 404 is none: it has no such words."""


class Refused(Exception):  # noqa: N818 (the condition)
    """The server has read the record and will never take it."""


class Records:
    """Does what records say, for one run of one server. Raises what MLflow raises when that is not known to be done."""

    def __init__(self, tracking_uri: str, run_id: str | None = None) -> None:
        self.run_id = run_id
        self._client = MlflowClient(tracking_uri=tracking_uri)
        self._is_new = False
        self._steps: dict[str, set[int]] = {}

    @property
    def _run_id(self) -> str:
        if self.run_id is None:
            raise Refused("no record before this one says which run it is of")
        return self.run_id

    def apply(self, records: Sequence[Record]) -> None:
        """Does one record, or several of metrics together. Raises Refused when repeating it is of no use."""
        try:
            if len(records) > 1 or records[0]["op"] == "metrics":
                self.log(
                    [
                        Metric(name, value, record["time"], record["step"])
                        for record in records
                        for name, value in record["values"].items()
                    ]
                )
            else:
                self._one(records[0])
        except RestException as error:
            if error.error_code in _FINAL:
                raise Refused(str(error)) from error
            raise

    def _one(self, record: Record) -> None:
        client = self._client
        op = record["op"]
        if op == "run":
            self._begin(record)
            return
        run_id = self._run_id
        if op == "params":
            self._params(run_id, record["values"])
        elif op == "text":
            client.log_dict(run_id, record["values"], record["name"])
        elif op == "tag":
            client.set_tag(run_id, record["name"], record["value"])
        elif op == "dataset":
            client.log_inputs(run_id, datasets=[_dataset(record)])
        elif op == "file":
            self._file(run_id, Path(record["path"]), record["folder"])
        elif op == "model":
            self._model(run_id, record)
        elif op == "end":
            client.set_terminated(run_id, record["status"], record["time"])
        else:
            raise Refused(f"no such record: {op!r}")

    def log(self, metrics: Sequence[Metric]) -> None:
        """Sends those metrics whose (key, step) the run does not have."""
        fresh = []
        try:
            for metric in metrics:
                steps = self.steps(metric.key)
                if metric.step not in steps:
                    steps.add(metric.step)
                    fresh.append(metric)
            for start in range(0, len(fresh), MOST_METRICS):
                self._client.log_batch(self._run_id, metrics=fresh[start : start + MOST_METRICS])
        except BaseException:
            # Done or not done: nobody knows, so the server is asked before anything is sent again.
            self._steps.clear()
            self._is_new = False
            raise

    def steps(self, key: str) -> set[int]:
        """The steps for which the run has this metric; read back when somebody else, or doubt, was before us."""
        if key not in self._steps:
            held = [] if self._is_new else self._client.get_metric_history(self._run_id, key)
            self._steps[key] = {metric.step for metric in held}
        return self._steps[key]

    def _begin(self, record: Record) -> None:
        experiment = self._experiment(record["experiment"], record["artifacts"])
        found = self.created(experiment, record["id"])
        if found is None and record["resume"]:
            same = f"tags.`{IDENTITY_TAG}` = '{record['resume']}'"
            if not record.get("resume_finished"):  # spools of before have no such word
                same += " and attributes.status != 'FINISHED'"
            found = self._newest(experiment, same)
            if found is not None:
                ids = [*found.data.tags.get(ID_TAG, "").split(), record["id"]]
                self._client.set_tag(found.info.run_id, ID_TAG, " ".join(ids[-_MOST_IDS:]))
        if found is None:
            created = self._client.create_run(
                experiment,
                start_time=record["time"],
                tags={**record["tags"], ID_TAG: record["id"]},
                run_name=record["name"],
            )
            self.run_id, self._is_new = created.info.run_id, True
            return
        self.run_id = found.info.run_id
        tags = [RunTag(name, value) for name, value in record["tags"].items()]
        self._client.log_batch(self.run_id, tags=tags)
        self._client.update_run(self.run_id, "RUNNING")

    def created(self, experiment: str, local_id: str) -> MlflowRun | None:
        """The run that an earlier attempt has made for this id, whose answer was lost."""
        return self._newest(experiment, f"tags.`{ID_TAG}` LIKE '%{local_id}%'")

    def _newest(self, experiment: str, condition: str) -> MlflowRun | None:
        found = self._client.search_runs(
            [experiment], condition, max_results=1, order_by=["attributes.start_time DESC"]
        )
        return found[0] if found else None

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Another job was quicker.
            found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise MlflowException(f"experiment {name!r} was deleted: mlflow experiments restore")
        return str(found.experiment_id)

    def _params(self, run_id: str, values: dict[str, str]) -> None:
        """MLflow refuses another value for a parameter; of a resumed run the first one stays."""
        held = {} if self._is_new else self._client.get_run(run_id).data.params
        params = [Param(name, value) for name, value in values.items() if name not in held]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])

    def _file(self, run_id: str, path: Path, folder: str | None) -> None:
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), folder)
        elif path.exists():
            self._client.log_artifact(run_id, str(path), folder)
        else:
            raise Refused(f"{path} is gone")

    def _model(self, run_id: str, record: Record) -> None:
        """The run's model of this name: made, filled and only then READY, so that half of one is taken for none."""
        path, client = Path(record["path"]), self._client
        if not path.is_dir():
            raise Refused(f"{path} is gone")
        run = client.get_run(run_id)
        same = f"name = '{record['name']}' AND source_run_id = '{run_id}'"
        held = client.search_logged_models([run.info.experiment_id], filter_string=same)
        model = held[0] if held else None
        if model is None:
            model = client.create_logged_model(
                run.info.experiment_id,
                name=record["name"],
                source_run_id=run_id,
                params=record["params"],
                model_type=record["type"],
            )
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in [output.model_id for output in outputs]:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, record["step"])])
        if model.status != LoggedModelStatus.READY:
            client.log_model_artifacts(model.model_id, str(path))
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def _dataset(record: Record) -> DatasetInput:
    source = HTTPDatasetSource(record["url"])  # type: ignore[no-untyped-call]  # only holds the URL
    digest: Any = record["digest"]
    # mypy takes the base's unset `profile` for abstract; MLflow's documentation makes one like this.
    data = MetaDataset(source=source, name=record["name"], digest=digest[:36])  # type: ignore[abstract]
    tags = [InputTag("mlflow.data.context", "features"), InputTag("manifest", digest)]
    return DatasetInput(dataset=data._to_mlflow_entity(), tags=tags)
