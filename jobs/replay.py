"""What MLflow was not there to take is sent to it now: `crab replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crab_platform.delivery import Outcome, deliver_folder, waiting
from crab_platform.spool import spools
from jobs.output import line
from jobs.spec_errors import SpecError


def replay(folder: Path, give_up_s: float) -> dict[str, Any]:
    """Delivers all spools in and below a folder; what it returns says how many records went, and what is left."""
    if not folder.is_dir():
        raise SpecError(f"{folder} is not a folder; name that of a run, or of all runs")
    found: list[Outcome] = []
    for place in waiting(folder):
        for outcome in deliver_folder(place, give_up_s=give_up_s):
            found.append(outcome)
            line(_told(outcome))
    left = [str(path) for place in waiting(folder) for path in spools(place)]
    return {
        "runs": [outcome.cursor.run_id for outcome in found if not outcome.path.exists()],
        "delivered": sum(outcome.cursor.delivered for outcome in found),
        "refused": sum(outcome.cursor.refused for outcome in found),
        "damaged": sum(outcome.cursor.damaged for outcome in found),
        "left": left,
    }


def _told(outcome: Outcome) -> str:
    cursor, path = outcome.cursor, outcome.path
    run = path.parent.parent.name
    if path.exists():
        return f"{run}: not delivered: {cursor.trouble or 'its job runs'}"
    said = f"{run}: all {cursor.delivered} records are in MLflow's run {cursor.run_id}"
    if cursor.refused:
        said += f"; {cursor.refused} were refused: {path.with_suffix('.refused')}"
    if cursor.damaged:
        said += f"; {cursor.damaged} spoiled lines were left out"
    return said
