"""MLflow: one run a job, with the resolved spec, the git commit, the manifest as data set, metrics and files.

Explicit ids through MlflowClient throughout: the fluent API keeps an active run in a global, which other processes
override by environment variables.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunStatus

_PARAM_LENGTH = 6000
"""MLflow refuses longer parameter values; the whole spec is kept as a file as well."""


class Run:
    """One MLflow run that is being written. Picklable: holds the URI and the ids only."""

    def __init__(self, tracking_uri: str, experiment: str, run_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_id = run_id

    def __reduce__(self) -> tuple[type[Run], tuple[str, str, str]]:
        return (Run, (self.tracking_uri, self.experiment, self.run_id))

    @property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.tracking_uri)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs metrics of one step; `/` groups them in MLflow's pages."""
        now = int(time.time() * 1000)
        batch = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=batch)

    def dataset(self, name: str, digest: str, url: str) -> None:
        """Logs a manifest as input of the run, by its digest; no data is read."""
        source = HTTPDatasetSource(url)  # type: ignore[no-untyped-call]  # only holds the URL
        # mypy takes the base's unset `profile` for abstract; MLflow's documentation makes one like this.
        data = MetaDataset(source=source, name=name, digest=digest[:36])  # type: ignore[abstract]
        tags = [InputTag("mlflow.data.context", "features"), InputTag("manifest", digest)]
        entity = DatasetInput(dataset=data._to_mlflow_entity(), tags=tags)
        self._client.log_inputs(self.run_id, datasets=[entity])

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """Copies a file, or a folder with all its files, to the artefacts of the run."""
        path = Path(path)
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        self._client.set_tag(self.run_id, name, value)


@contextmanager
def start_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    *,
    spec: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """A run for the length of the block: FINISHED at its end, FAILED when it raises, KILLED on Ctrl-C."""
    client = MlflowClient(tracking_uri=tracking_uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = (
        found.experiment_id
        if found
        else client.create_experiment(experiment, artifact_location=_artifacts(tracking_uri))
    )
    commit, dirty = git_commit()
    created = client.create_run(
        experiment_id,
        run_name=name,
        tags={"git.commit": commit, "git.dirty": str(dirty).lower(), **(tags or {})},
    )
    run = Run(tracking_uri, experiment, created.info.run_id)
    params = [Param(key, value[:_PARAM_LENGTH]) for key, value in flatten(spec).items()]
    for start in range(0, len(params), 100):
        client.log_batch(run.run_id, params=params[start : start + 100])
    client.log_dict(run.run_id, dict(spec), "spec.yaml")
    status = RunStatus.FAILED
    try:
        yield run
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        raise
    finally:
        client.set_terminated(run.run_id, RunStatus.to_string(status))


def _artifacts(tracking_uri: str) -> str | None:
    """Where files of runs go: beside a sqlite file (MLflow would take the current folder), else as the server says."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return None
    database = Path(tracking_uri.removeprefix(prefix))
    database.parent.mkdir(parents=True, exist_ok=True)
    return (database.parent / "mlartifacts").absolute().as_uri()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names: {"a": {"b": 1}} -> {"a.b": "1"}; lists are written as they print."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def git_commit() -> tuple[str, bool]:
    """(commit of the working tree we run from, whether it has uncommitted changes); ("unknown", False) outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
