"""A job that logs for some seconds and says what each call of the loop cost; a process, so that it can be killed.

    python -m support.tracked_job URI FOLDER SECONDS [--how direct] [--end-limit S] [--resume IDENTITY] [--first STEP]

Prints a line `step N` after each call, and at last a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from crab_platform import tracking

EVERY_S = 0.02
KEYS = ("loss", "rate/learning")


class DirectRun:
    """Planted bug: the training loop talks to the server itself."""

    def __init__(self, uri: str, run_id: str) -> None:
        # Else one call would take minutes.
        os.environ.update(MLFLOW_HTTP_REQUEST_TIMEOUT="2", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
        from mlflow import MlflowClient

        self._client = MlflowClient(uri)
        self.run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("folder", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--how", default="spool")
    parser.add_argument("--end-limit", type=float)
    parser.add_argument("--resume")
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    if given.end_limit is not None:  # planted bug: the job waits for the server
        tracking.END_LIMIT_S = tracking.SILENT_LIMIT_S = given.end_limit
    note = given.folder / "note.txt"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text("what the run has made")
    calls: list[tuple[float, float]] = []
    errors = 0
    with tracking.start_run(
        given.uri,
        "outage",
        "job",
        spec={"seconds": given.seconds},
        folder=given.folder,
        resume=given.resume,
    ) as run:
        logger = DirectRun(given.uri, run.run_id) if given.how == "direct" else run
        print("begun", flush=True)
        began = time.monotonic()
        step = given.first
        while time.monotonic() - began < given.seconds:
            values = {name: float(step) for name in KEYS}
            called = time.perf_counter()
            try:
                logger.metrics(values, step)
            except Exception:  # counted: the test wants none
                errors += 1
            took = time.perf_counter() - called
            calls.append((time.time(), took))
            print(f"step {step}", flush=True)
            step += 1
            time.sleep(EVERY_S)
        run.dataset("clips", "a1" * 32, "s3://bucket/manifests/x.parquet")
        run.file(note)
        note.unlink()  # the next run of the name begins with that
        ended = time.time()
    print(json.dumps({"run_id": run.run_id, "errors": errors, "calls": calls, "ended": ended}))


if __name__ == "__main__":
    main()
