"""The page of a sweep: which trial is best and whether that holds, what was tried, what was stopped and why, its cost.

    sweep.json -> sweep_trials.py -> sweep_*.py, a figure each -> sweep_views.py -> page.py (templates/) -> index.html

All figures are SVG inside the page, drawn here; the page is one file. Its one script sorts the table and marks a trial
everywhere at once; the Content-Security-Policy names it by its digest, so no other can run, and nothing needs it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crab.report import sweep_cost, sweep_seeds, sweep_table, sweep_timeline
from crab.report.colours import levels
from crab.report.page import write_template
from crab.report.scales import short, word
from crab.report.sweep_curves import curves, parallel
from crab.report.sweep_surface import response
from crab.report.sweep_trials import STATUSES, Sweep, read_sweep
from crab.report.sweep_views import SweepPage
from crab.report.texts import clean

_FACTS = ("metric", "scheduler", "searcher", "max_steps", "seed", "manifest", "identity", "adapter")
_DIGEST = 16
"""Characters of a digest that tell it from any other here; sweep.json has all of them."""


def sweep_page(sweep: Mapping[str, Any]) -> SweepPage:
    """All that the page shows, from a record with the schema of sweep.json. Raises ValueError where it is none."""
    found = read_sweep(sweep)
    return SweepPage(
        title=f"Sweep {found.name}",
        facts=_facts(sweep, found),
        remarks=_remarks(sweep),
        summary=sweep_timeline.summary(found),
        metric=found.metric,
        better=found.better,
        key=_key(found),
        statuses=tuple(s for s in STATUSES if any(trial.status == s for trial in found.trials)),
        space=_space(sweep.get("space") or {}),
        headline=sweep_seeds.headline(found),
        confirmed=sweep_seeds.rows(found),
        verdicts=sweep_seeds.verdicts(found),
        seeds=sweep_seeds.seeds(found),
        response=response(found) if found.trials else None,
        curves=curves(found),
        parallel=parallel(found),
        columns=sweep_table.columns(found),
        rows=sweep_table.rows(found),
        timeline=sweep_timeline.timeline(found),
        stops=sweep_timeline.stops(found),
        costs=sweep_cost.figures(found, sweep.get("spent") or {}),
        saved=sweep_cost.saved_words(found),
        spending=sweep_cost.spending(found),
    )


def write_sweep(page: SweepPage, folder: Path) -> Path:
    """Writes index.html into `folder`, which is all of the page, and returns its path."""
    return write_template(
        "sweep.html.jinja",
        folder,
        script="sweep.js",
        page=page,
        light=levels(dark=False),
        dark=levels(dark=True),
    )


def _facts(sweep: Mapping[str, Any], found: Sweep) -> tuple[tuple[str, str], ...]:
    facts = []
    for name in _FACTS:
        value = sweep.get(name)
        if value is None:
            continue
        text = word(value)
        if name == "metric":
            text += f", {found.better} is better"
        elif name in ("manifest", "identity"):
            text = text[:_DIGEST]
        facts.append((name.replace("_", " "), text))
    most = (sweep.get("capacity") or {}).get("max_concurrent")
    return (*facts, *([("trials at once", word(most))] if most is not None else []))


def _remarks(sweep: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader must know before all figures."""
    lines = []
    if sweep.get("stopped_because"):
        lines.append(f"The sweep was stopped before its end: {sweep['stopped_because']}")
    sentence = (sweep.get("capacity") or {}).get("sentence")
    return tuple(clean(str(text)) for text in [*lines, *([sentence] if sentence else [])])


def _key(sweep: Sweep) -> tuple[str, str] | None:
    """The ends of the scale of colours; the worst end says whether worse values share its colour."""
    if sweep.limits is None:
        return None
    best, worst = sweep.limits
    beyond = any(
        trial.counts and trial.best is not None and sweep.is_better(worst, trial.best)
        for trial in sweep.trials
    )
    return f"{short(worst)}{' and worse' if beyond else ''}", short(best)


def _space(space: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, what it may be) of each parameter."""
    lines = []
    for name, raw in space.items():
        if raw.get("kind") == "choice":
            text = "one of " + ", ".join(word(choice) for choice in raw.get("choices") or ())
        else:
            kind = "whole number" if raw.get("kind") == "int" else "number"
            text = f"{kind} from {word(raw.get('low'))} to {word(raw.get('high'))}"
            text += ", drawn evenly over its logarithm" if raw.get("log") else ""
        lines.append((clean(str(name)), text))
    return tuple(lines)
