"""Trials as lines: the metric over the steps, and the metric over all parameters."""

from collections.abc import Sequence

from crab.report.plots import Area, clipped, labels
from crab.report.scales import Range, limits, range_over
from crab.report.sweep_trials import Sweep, Trial
from crab.report.sweep_views import Curves, Line, Mark, Parallel, Rung, Upright

_AREA = Area(width=620.0, height=440.0)
_POINTS = 100
"""Of a curve; more could not be told apart and would be most of the page."""
_RUNGS = 8
"""With more places to stop at there are no rungs (a median rule stops anywhere), and lines would hide the curves."""

_HEIGHT, _TOP, _BOTTOM = 330.0, 46.0, 312.0
_BESIDE = 64.0
_APART = 120.0
"""Pixels between upright axes at least: names and labels need them."""


def curves(sweep: Sweep) -> Curves | None:
    """The metric of every trial over its steps, and how each of them ended; None where no trial has a value."""
    drawn = [trial for trial in sweep.trials if any(v is not None for _, v in trial.curve)]
    if not drawn:
        return None
    values = [value for trial in drawn for _, value in trial.curve if value is not None]
    steps = range_over(
        [0.0, sweep.max_steps, *(step for trial in drawn for step, _ in trial.curve)], whole=True
    )
    upwards = range_over(limits(values, sweep.lower_is_better) or ())
    beyond = sum(not -1e-9 <= (upwards.share(value) or 0.0) <= 1 + 1e-9 for value in values)
    ordered = _best_last(sweep, drawn)
    ends = tuple(_end(sweep, trial, steps, upwards) for trial in ordered)
    winner = sweep.winner
    by_name = {trial.name: trial for trial in drawn}
    caption = (
        "The mark at the end of a curve says how the trial ended; a single value is a mark alone."
    )
    if any(trial.parent is not None for trial in drawn):
        caption += " A curve begins where the trial ended that it has gone on from."
    if beyond:
        caption += f" Beyond the axis, and drawn at its edge: {beyond} of {len(values)} values."
    return Curves(
        plot=_AREA.plot(
            _AREA.x_axis("training steps", steps), _AREA.y_axis(sweep.metric_title, upwards)
        ),
        lines=tuple(
            _curve(sweep, trial, by_name.get(trial.parent or ""), steps, upwards)
            for trial in ordered
        ),
        ends=ends,
        rungs=_rungs(sweep, steps),
        best=next((mark for mark in ends if winner and mark.key == winner.key), None),
        caption=caption,
    )


def _curve(sweep: Sweep, trial: Trial, parent: Trial | None, steps: Range, upwards: Range) -> Line:
    every = -(-len(trial.curve) // _POINTS)
    kept = trial.curve[::every]
    kept += trial.curve[-1:] if kept[-1] != trial.curve[-1] else ()
    kept = (parent.curve[-1:] if parent else ()) + kept
    places = [
        (_AREA.x(steps.share(step) or 0.0), _AREA.y(clipped(share)))
        if (share := upwards.share(value)) is not None
        else None
        for step, value in kept
    ]
    return _line(sweep, trial, places)


def _end(sweep: Sweep, trial: Trial, steps: Range, upwards: Range) -> Mark:
    step, value = next((s, v) for s, v in reversed(trial.curve) if v is not None)
    return Mark(
        key=trial.key,
        x=_AREA.x(steps.share(step) or 0.0),
        y=_AREA.y(clipped(upwards.share(value) or 0.0)),
        r=4.5,
        status=trial.status,
        level=sweep.level(trial.best),
        words=sweep.words(trial),
    )


def _rungs(sweep: Sweep, steps: Range) -> tuple[Rung, ...]:
    stopped = [trial.steps for trial in sweep.trials if trial.status == "stopped"]
    places = sorted(set(stopped))
    if len(places) > _RUNGS:
        return ()
    rungs: list[Rung] = []
    for place in places:
        at = _AREA.x(steps.share(place) or 0.0)
        near = bool(rungs) and at - rungs[-1].at < 70
        rungs.append(Rung(at=at, text="" if near else f"{stopped.count(place)} stopped"))
    return tuple(rungs)


def parallel(sweep: Sweep) -> Parallel | None:
    """Every trial as a line over all parameters to its best value; None where nothing was tried or varied."""
    if not sweep.trials or not sweep.searched:
        return None
    values = range_over(sweep.limits or ())
    width = max(1000.0, 2 * _BESIDE + _APART * len(sweep.searched))
    apart = (width - 2 * _BESIDE) / len(sweep.searched)
    xs = [round(_BESIDE + apart * index, 1) for index in range(len(sweep.searched) + 1)]
    axes = [
        Upright(
            x=x,
            name=parameter.name,
            note=parameter.title.removeprefix(parameter.name).strip(" ()"),
            labels=labels(parameter.scale.ticks(), _upright, gap=14.0),
        )
        for x, parameter in zip(xs, sweep.searched, strict=False)
    ]
    axes.append(
        Upright(
            x=xs[-1],
            name=f"best {sweep.metric}",
            note=f"{sweep.better} is better",
            labels=labels(values.ticks() if sweep.limits else (), _upright, gap=14.0),
        )
    )
    lines = []
    for trial in _best_last(sweep, sweep.trials):
        shares = [parameter.share(trial.config) for parameter in sweep.searched]
        shares.append(values.share(trial.best) if trial.counts else None)
        places = [
            None if share is None else (x, _upright(clipped(share)))
            for x, share in zip(xs, shares, strict=True)
        ]
        lines.append(_line(sweep, trial, places))
    return Parallel(
        width=width,
        height=_HEIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        axes=tuple(axes),
        lines=tuple(lines),
        caption="Grey lines are trials without a value; a line breaks where a trial lacks the parameter.",
    )


def _upright(share: float) -> float:
    return round(_BOTTOM - 8 - share * (_BOTTOM - _TOP - 16), 1)


def _best_last(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """So that the best lie on top."""

    def level(trial: Trial) -> int:
        found = sweep.level(trial.best) if trial.counts else None
        return -1 if found is None else found

    return sorted(trials, key=level)


def _line(sweep: Sweep, trial: Trial, places: Sequence[tuple[float, float] | None]) -> Line:
    parts: list[list[str]] = [[]]
    for place in places:
        if place is None:
            parts.append([])
        else:
            parts[-1].append("{:g},{:g}".format(*place))
    return Line(
        key=trial.key,
        level=sweep.level(trial.best) if trial.counts else None,
        status=trial.status,
        parts=tuple(" ".join(part) for part in parts if len(part) > 1),
        words=sweep.words(trial),
    )
