"""What specs of several jobs have in common: names, tracking, data, features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from crab.tasks import TASKS
from jobs.spec_base import Place, Record, absolute_sqlite
from jobs.spec_cache import CachePlace
from jobs.spec_errors import NAME


def _known_tasks(names: list[str]) -> list[str]:
    for name in names:
        if name not in TASKS:
            raise ValueError(f"{name!r} is no task; known are {', '.join(TASKS)}")
    return names


Tasks = Annotated[
    list[str],
    AfterValidator(_known_tasks),
    Field(default_factory=lambda: list(TASKS), min_length=1),
]
"""Names of tasks; all when left out."""


class DataSource(Record):
    """Clips and what is asked about them, or loose media files."""

    name: str = Field(pattern=NAME)
    """Stands in manifests instead of the folder, so that a data set has the same name on every machine."""
    samples: Place | None = None
    """A samples.jsonl, or the samples.json of Crab's own examples."""
    files: Place | None = None
    """A folder: every file below it, each with the streams that its kind has."""

    @model_validator(mode="after")
    def _one(self) -> DataSource:
        if (self.samples is None) == (self.files is None):
            raise ValueError(f"data source {self.name!r}: give either samples or files")
        return self


class Tracking(Record):
    uri: Annotated[str, AfterValidator(absolute_sqlite)] = Field(
        default="sqlite:///work/mlflow.db", validate_default=True
    )
    experiment: str = "crab"


class Job(Record):
    name: str = Field(pattern=NAME)
    runs: Place = Field(default="work/runs", validate_default=True)
    """Folder of all runs; this one's is runs/name."""
    tracking: Tracking = Field(default_factory=Tracking)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


class Features(Record):
    """Cached features to read: which cache, and exactly which manifest of it."""

    cache: CachePlace
    manifest: str
    """A manifest's digest, or the name of a preprocess job whose last manifest is meant."""
    tasks: dict[str, Literal["music-avqa"]] = Field(default_factory=dict)
    """As `sampling.tasks` of the preprocess job."""
