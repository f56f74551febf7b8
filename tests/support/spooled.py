"""Records as a job writes them, and what of them a server holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from crab_platform.spool import Record, Spool

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "outage"


def first_record(
    uri: str, local_id: str, *, resume: str | None = None, experiment: str = EXPERIMENT
) -> Record:
    """Whose spool it is."""
    return {
        "op": "run",
        "uri": uri,
        "id": local_id,
        "experiment": experiment,
        "artifacts": None,
        "name": "job",
        "tags": {"identity": resume} if resume else {},
        "resume": resume,
        "time": 1_700_000_000_000,
    }


def metrics_record(step: int, key: str = "loss", *, attempt: int = 0) -> Record:
    """One step; a later attempt comes at another time and to another value."""
    time_ms = 1_700_000_000_000 + step + attempt * 1_000_000
    return {"op": "metrics", "time": time_ms, "step": step, "values": {key: step + attempt / 10}}


def end_record(status: str = "FINISHED") -> Record:
    """The end of a run."""
    return {"op": "end", "status": status, "time": 1_700_000_900_000}


def write_spool(folder: Path, records: Collection[Record]) -> Path:
    """A spool whose writer is gone."""
    first, *others = records
    spool = Spool.create(folder, first)
    for record in others:
        spool.append(record)
    spool.close()
    return spool.path


def runs(url: str, local_id: str = "", experiment: str = EXPERIMENT) -> list[Run]:
    """The runs of the experiment, or those made for one id."""
    from mlflow import MlflowClient  # writers that are killed by the hundred do not need it

    client = MlflowClient(url)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    condition = f"tags.`crab.run` LIKE '%{local_id}%'" if local_id else ""
    return list(client.search_runs([found.experiment_id], condition))


def problems(
    url: str,
    steps: Collection[int],
    *,
    keys: Collection[str] = ("loss",),
    status: str = "FINISHED",
    local_id: str = "",
    experiment: str = EXPERIMENT,
    files: Collection[str] = (),
) -> list[str]:
    """What is lost, doubled or wrong of one run that was to log these steps."""
    from mlflow import MlflowClient

    found = runs(url, local_id, experiment)
    said = [] if len(found) == 1 else [f"{len(found)} runs"]
    client = MlflowClient(url)
    for run in found:
        if run.info.status != status:
            said.append(f"status {run.info.status}")
        held = {item.path for item in client.list_artifacts(run.info.run_id)}
        said += [f"{name} is lost" for name in files if name not in held]
    for key in keys:
        seen = Counter(
            metric.step
            for run in found
            for metric in client.get_metric_history(run.info.run_id, key)
        )
        lost = set(steps) - set(seen)
        doubled = [step for step, times in seen.items() if times > 1]
        strange = set(seen) - set(steps)
        for name, which in (("lost", lost), ("doubled", doubled), ("invented", strange)):
            if which:
                said.append(f"{key}: {len(which)} steps are {name}")
    return said
