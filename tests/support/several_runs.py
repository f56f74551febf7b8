"""Whole jobs, one after the other on one Ray of their own: a start of it costs much of a minute on a small machine."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.crab_runs import CrabRun

CODE = "from support.several_runs import main; main()"


def run_all(
    records: Sequence[dict[str, Any]], env: dict[str, str], folder: Path
) -> list[dict[str, Any]]:
    """The results of these specs, run in this order."""
    paths = []
    for number, record in enumerate(records):
        path = folder / f"spec-{number}.yaml"
        path.write_text(json.dumps(record))  # JSON is YAML
        paths.append(str(path))
    sets = [f"runs={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
    run = CrabRun([json.dumps([paths, sets])], env, folder, code=CODE)
    try:
        found: list[dict[str, Any]] = run.finish()
        return found
    finally:
        run.end_all()


def main() -> None:
    from crab_platform import ray_cluster
    from jobs.run import run_spec
    from jobs.spec import load_spec

    paths, sets = json.loads(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr), ray_cluster.connected(2):
        results = [run_spec(load_spec(path, sets)) for path in paths]
    print(json.dumps(results))
