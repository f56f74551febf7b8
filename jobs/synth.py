"""AV-Shapes as a job, so that a sequence can start from nothing: `crab run SPEC` with `job: synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crab.synth.dataset import synthesise
from crab_platform import tracking
from jobs.output import RESULT, line, write_result
from jobs.spec import SynthSpec, spec_record


def run(spec: SynthSpec) -> dict[str, Any]:
    """Makes the clips that are missing and returns result.json of the run."""
    with tracking.start_run(
        spec.tracking.uri,
        spec.tracking.experiment,
        spec.name,
        spec=spec_record(spec),
        folder=spec.folder,
    ) as run_:
        samples = synthesise(Path(spec.out), spec.clips, spec.seed)
        result = {
            "job": spec.job,
            "name": spec.name,
            "samples": str(samples),
            "clips": spec.clips,
            "seed": spec.seed,
            "mlflow_run": run_.run_id,
        }
        write_result(spec.folder, result)
        run_.file(spec.folder / RESULT)
    line(f"{spec.name}: {spec.clips} clips, samples in {samples}")
    return result
