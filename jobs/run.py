"""One spec in, its job run, its result out. The module of a kind is jobs/KIND.py, and its entry is run(spec)."""

from __future__ import annotations

import importlib
from typing import Any

from crab_platform.cache import PublishTooSlow
from crab_platform.holding import FeaturesGone
from crab_platform.leases import LeaseLost
from crab_platform.storage import StoreRefused, StoreUnreachable
from jobs.spec import Spec


class JobFailed(Exception):  # noqa: N818 (the condition that the command line reports)
    """The work failed for a reason that is not the input's; exit code 1."""


def run_spec(spec: Spec) -> dict[str, Any]:
    """Runs a job of any kind and returns what result.json of its run holds.

    Raises ValueError for wrong input, StoreUnreachable when the cache cannot be used, JobFailed when the work failed in
    Ray's workers.
    """
    # Each kind imports what it needs: a preprocess job needs no DeepSpeed.
    module = importlib.import_module(f"jobs.{spec.job}")
    try:
        result: dict[str, Any] = module.run(spec)
    except (FeaturesGone, LeaseLost, PublishTooSlow) as error:
        raise JobFailed(str(error)) from error
    except Exception as error:  # only Ray's own are reworded, all others go on as they are
        if not type(error).__module__.startswith("ray."):
            raise
        raise _in_plain_words(spec, error) from error
    return result


def _in_plain_words(spec: Spec, error: Exception) -> Exception:
    """What a worker raised, without Ray's frames around it."""
    said = _said(error)
    kind, _, words = said.partition(": ")
    if isinstance(error, StoreUnreachable) or kind.rpartition(".")[2] in _UNREACHABLE:
        return StoreUnreachable(words or said)
    return JobFailed(
        f"{spec.job} job {spec.name!r} failed: {said}\n"
        "The workers' logs are in /tmp/ray/session_latest/logs. Mend it and start the same command again: what was "
        "done is not done again."
    )


_UNREACHABLE = {StoreUnreachable.__name__, StoreRefused.__name__}


def _said(error: Exception) -> str:
    """The last words of what was raised first: "ValueError: what is wrong"."""
    cause = getattr(error, "cause", None) or error
    # Ray Data puts an error of its own above ours, and tells both as Python does.
    first, above, _ = str(error).partition("\nThe above exception was the direct cause of")
    lines = [line for line in (first if above else str(cause)).splitlines() if line.strip()]
    said = lines[-1].strip() if lines else ""
    return said if above else f"{type(cause).__name__}: {said}"
