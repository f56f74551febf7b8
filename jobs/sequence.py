"""Jobs one after the other, in one command: `crab run SPEC` with `job: sequence`."""

from __future__ import annotations

import time
from typing import Any

from crab_platform.storage import StoreUnreachable
from jobs.output import line, table, write_result
from jobs.run import JobFailed, run_spec
from jobs.spec import SequenceSpec, SpecError


def run(spec: SequenceSpec) -> dict[str, Any]:
    """Runs each step to its end, stops at the first that fails, and returns result.json of the sequence.

    Nothing is skipped here: a step that is done already finds that out by itself, as it does when it is run alone.
    Raises what the step raised, with words before it that say which step it was.
    """
    count = len(spec.steps)
    results: list[dict[str, Any]] = []
    rows: list[tuple[str, str, float]] = []
    for number, step in enumerate(spec.steps, start=1):
        which = f"step {number} of {count}, {step.job} {step.name!r}"
        line(f"\n{which}")
        started = time.monotonic()
        try:
            results.append(run_spec(step))
        except (StoreUnreachable, JobFailed) as error:
            raise type(error)(f"{which}: {error}") from error
        except ValueError as error:
            raise SpecError(f"{which}: {error}") from error
        except Exception as error:  # raised again, with its place
            error.add_note(f"This was {which} of {spec.name!r}.")
            raise
        rows.append((step.name, step.job, round(time.monotonic() - started, 1)))
    result = {
        "job": spec.job,
        "name": spec.name,
        "steps": results,
        "seconds": {name: seconds for name, _, seconds in rows},
    }
    write_result(spec.folder, result)
    table(f"{spec.name}: all {count} steps are done", ("step", "job", "seconds"), rows)
    return result
