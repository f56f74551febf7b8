"""What a trial of a sweep trains: made in the trial's process, from the one before it where that saves time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_platform.catalog import Manifest
from crab_platform.training_config import Recipe
from crab_platform.trial import NUMBER, PARENT
from jobs.recipe import CrabRecipe
from jobs.spec import TrainSpec
from jobs.trial_spec import trial_spec
from tune_spaces.space import Space

SEED = "seed"
"""Beside the parameters of the space, in samples that are trained again."""
LABEL = "label"
"""Likewise: what the sample is called."""


@dataclass(frozen=True, kw_only=True)
class TrialBuild:
    """Makes the recipe of a sample."""

    train: TrainSpec
    space: Space
    manifest: Manifest
    adapters: Path
    """Folder for the adapters of trials that are exported, each in the folder of its number."""
    lineage: Mapping[str, Any]

    def __call__(self, sample: Mapping[str, Any], before: Recipe | None) -> CrabRecipe:
        assert before is None or isinstance(before, CrabRecipe)
        sample = dict(sample)
        number = sample.pop(NUMBER)
        spec = spec_of(self.train, self.space, sample)
        return CrabRecipe(
            spec,
            self.manifest,
            self.adapters / f"{number:05d}",
            {**self.lineage, "sample": sample},
            before,
        )


def spec_of(train: TrainSpec, space: Space, sample: Mapping[str, Any]) -> TrainSpec:
    """The train spec of a sample. Raises SpecError."""
    spec = trial_spec(train, space, plain(sample))
    if SEED not in sample:
        return spec
    optimisation = spec.optimisation.model_copy(update={"seed": sample[SEED]})
    return spec.model_copy(update={"optimisation": optimisation})


def plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the space alone."""
    return {name: value for name, value in sample.items() if name not in (SEED, LABEL, PARENT)}
