"""Makes the tiny preset: `crab run jobs/specs/pretrain-tiny.yaml`. One process, stage by stage, an hour or two.

Each stage leaves a folder in `out/stages` that gets its name when it is complete. A run that was killed does not do the
finished stages again; the one that it died in begins anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crab.pretrain.stages import Pretraining, Sizes, write_preset
from crab_platform import tracking
from jobs.output import line, progress, write_result
from jobs.presets import write_digests
from jobs.spec import PretrainSpec, SpecError, spec_record


def run(spec: PretrainSpec) -> dict[str, Any]:
    """Trains everything on scenes that are rendered in memory; the weights are in `out/preset`."""
    out = Path(spec.out)
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(**{name: getattr(spec, name) for name in Sizes.__dataclass_fields__})
    _claim(out, sizes)
    metrics: dict[str, float] = {}
    with tracking.start_run(
        spec.tracking.uri,
        spec.tracking.experiment,
        spec.name,
        spec=spec_record(spec),
        folder=spec.folder,
    ) as run_:

        def stage(name: str, work: Callable[..., None], steps: int) -> None:
            with progress(f"{name} steps", steps) as bar:

                def on_step(step: int, values: dict[str, float]) -> None:
                    bar(step, steps)
                    metrics.update({f"{name}/{key}": value for key, value in values.items()})
                    if step % 20 == 0 or step == steps:
                        run_.metrics({f"{name}/{key}": v for key, v in values.items()}, step)

                _whole(stages / name, lambda folder: work(folder, on_step))

        for name, (work, steps) in Pretraining(stages, sizes).stages.items():
            if (stages / name).exists():
                line(f"{name}: done already")
            else:
                stage(name, work, steps)
        preset = out / "preset"
        if not preset.exists():
            _whole(preset, lambda folder: _finish(stages, folder))
        result = {"job": spec.job, "name": spec.name, "out": str(preset), "metrics": metrics}
        write_result(spec.folder, result)
    line(f"preset: {preset}. To use it: copy it over crab/presets/tiny")
    return result


def _finish(stages: Path, folder: Path) -> None:
    write_preset(stages, folder)
    write_digests(folder)


def _whole(folder: Path, work: Callable[[Path], None]) -> None:
    """Another name first, then a rename: a folder that is there is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    work(temporary)
    os.replace(temporary, folder)


def _claim(out: Path, sizes: Sizes) -> None:
    """Stages of other settings must not be taken for ours."""
    record = out / "pretrain.json"
    wanted = vars(sizes)
    if record.exists():
        held = json.loads(record.read_text())
        if differ := [name for name in wanted if held.get(name) != wanted[name]]:
            raise SpecError(
                f"{out} holds stages with other values of {', '.join(differ)}; give another `out`, or remove it first"
            )
        return
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(wanted, indent=2) + "\n")
    os.replace(temporary, record)
