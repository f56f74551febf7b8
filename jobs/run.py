"""One spec in, its job run, its result out."""

from __future__ import annotations

import importlib
from typing import Any

from jobs.spec import Spec


class JobFailed(Exception):  # noqa: N818 (the condition that the command line reports)
    """The work failed for a reason that is not the input's; exit code 1."""


def run_spec(spec: Spec) -> dict[str, Any]:
    """Runs a job of any kind and returns what result.json of its run holds.

    Raises ValueError for wrong input, StoreUnreachable when the cache cannot be used, JobFailed when the work failed.
    """
    # Each kind imports what it needs: a preprocess job needs no DeepSpeed.
    module = importlib.import_module(f"jobs.{spec.job}")
    result: dict[str, Any] = module.run(spec)
    return result
