"""Two parameters against the metric: every trial where it was tried, and what may lie between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crab.report.plots import Area, clipped
from crab.report.scales import range_over
from crab.report.sweep_parameters import Parameter
from crab.report.sweep_trials import Sweep, Trial, trials
from crab.report.sweep_views import Cell, Mark, Plot, Response, Surface

FEWEST = 4
"""Trials. A surface through fewer would be drawn by the method and not by the trials."""

_PREFERRED = ("num_heads", "router_temperature")
_AREA = Area(width=620.0, height=440.0, pad=20.0)
_COLUMNS, _ROWS = 36, 26
_REACH = 0.22
"""In shares of the axes. Farther than that from every trial nothing is drawn: it would be a guess about nothing."""
_MARGIN = 0.06
"""Cells reach that much farther, and an ellipse cuts them: a round border and no stairs."""
_RADII = (4.5, 9.0)
_MANY = 100
"""Trials from which on marks are smaller."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A trial at its shares of both axes."""

    x: float
    y: float
    value: float


def response(sweep: Sweep) -> Response | None:
    """The figure; None where no parameter is a number. With one such parameter the metric goes upwards."""
    numeric = [parameter for parameter in sweep.searched if parameter.numeric]
    if not numeric:
        return None
    by_name = {parameter.key: parameter for parameter in numeric}
    if all(name in by_name for name in _PREFERRED):
        numeric = [by_name[name] for name in _PREFERRED]
    return _plane(sweep, numeric[0], numeric[1]) if len(numeric) > 1 else _slope(sweep, numeric[0])


def _plane(sweep: Sweep, across: Parameter, up: Parameter) -> Response:
    marks, known, lost = [], [], 0
    rung = last_rung(sweep.trials)
    for trial in sweep.trials:
        x, y = across.share(trial.config), up.share(trial.config)
        if x is None or y is None:
            lost += 1
            continue
        marks.append(_mark(sweep, trial, _AREA.x(x), _AREA.y(y)))
        if trial.counts and trial.best is not None and trial.value_at(rung) is not None:
            known.append(_Known(x=x, y=y, value=trial.best))
    surface = _surface(sweep, known) if len(known) >= FEWEST else None
    if surface:
        caption = (
            f"Behind them, faint: {sweep.metric} between the {len(known)} trials that reached step {rung:g}, by inverse"
            " distance weighting: a guess, which is blank far from all of them."
        )
    else:
        caption = (
            f"No surface is drawn: {len(known)} of the trials shown reached the last rung with a value, and one"
            f" through fewer than {FEWEST} would say nothing."
        )
    if lost:
        caption += f" Not shown, as they lack one of the two parameters: {trials(lost)}."
    return _shown(
        sweep,
        marks,
        surface,
        caption,
        _AREA.plot(_AREA.x_axis(across.title, across.scale), _AREA.y_axis(up.title, up.scale)),
    )


def _slope(sweep: Sweep, across: Parameter) -> Response:
    values = range_over(sweep.limits or ())
    # Trials without a value stand at the end of the axis that no reader takes for a good one.
    nowhere = 1.0 if sweep.lower_is_better else 0.0
    marks, moved = [], 0
    for trial in sweep.trials:
        x = across.share(trial.config)
        if x is not None:
            y = values.share(trial.best) if trial.counts else None
            place = nowhere if y is None else clipped(y)
            moved += place != y
            marks.append(_mark(sweep, trial, _AREA.x(x), _AREA.y(place)))
    caption = "One parameter is a number, so there is no surface."
    if moved:
        edge = "upper" if sweep.lower_is_better else "lower"
        caption += f" At the {edge} edge: {trials(moved)} without a value or beyond the axis."
    return _shown(
        sweep,
        marks,
        None,
        caption,
        _AREA.plot(
            _AREA.x_axis(across.title, across.scale),
            _AREA.y_axis(f"best {sweep.metric_title}", values),
        ),
    )


def _shown(
    sweep: Sweep, marks: Sequence[Mark], surface: Surface | None, caption: str, plot: Plot
) -> Response:
    winner = sweep.winner
    return Response(
        plot=plot,
        # Large ones first: a small one that lies upon them can be seen.
        marks=tuple(sorted(marks, key=lambda mark: -mark.r)),
        surface=surface,
        best=next((mark for mark in marks if winner and mark.key == winner.key), None),
        caption=caption,
    )


def last_rung(trials: Sequence[Trial]) -> float:
    """The last step at which any trial has a value; NaN where none has."""
    steps = [step for trial in trials for step, value in trial.curve if value is not None]
    return max(steps, default=math.nan)


def _mark(sweep: Sweep, trial: Trial, x: float, y: float) -> Mark:
    """Its area grows with the steps that it was given."""
    most = max([sweep.max_steps, *(other.steps for other in sweep.trials)])
    low, high = (r * (0.65 if len(sweep.trials) > _MANY else 1.0) for r in _RADII)
    budget = trial.steps / most if most > 0 else 0.0
    return Mark(
        key=trial.key,
        x=x,
        y=y,
        r=round(math.sqrt(low**2 + clipped(budget) * (high**2 - low**2)), 1),
        status=trial.status,
        level=sweep.level(trial.best) if trial.counts else None,
        words=sweep.words(trial),
    )


def _surface(sweep: Sweep, known: Sequence[_Known]) -> Surface:
    """Cells of one colour that lie side by side are one."""
    wide, high = (_AREA.across + 2 * _AREA.pad) / _COLUMNS, (_AREA.up + 2 * _AREA.pad) / _ROWS
    cells = []
    for row in range(_ROWS):
        y = (high * (row + 0.5) - _AREA.pad) / _AREA.up
        levels = []
        for column in range(_COLUMNS):
            x = (wide * (column + 0.5) - _AREA.pad) / _AREA.across
            levels.append(sweep.level(weighted(known, x, y)))
        start = 0
        for column in range(1, _COLUMNS + 1):
            if column < _COLUMNS and levels[column] == levels[start]:
                continue
            level = levels[start]
            if level is not None:
                cells.append(
                    Cell(
                        x=round(_AREA.left + wide * start, 1),
                        y=round(_AREA.height - _AREA.bottom - high * (row + 1), 1),
                        width=round(wide * (column - start) + 0.4, 1),  # no seams
                        height=round(high + 0.4, 1),
                        level=level,
                    )
                )
            start = column
    return Surface(
        cells=tuple(cells),
        places=tuple((_AREA.x(one.x), _AREA.y(one.y)) for one in known),
        rx=round(_REACH * _AREA.across, 1),
        ry=round(_REACH * _AREA.up, 1),
    )


def weighted(known: Sequence[_Known], x: float, y: float) -> float | None:
    """The mean of the values, each weighted by 1 / distance squared; None far from all of them."""
    squares = [(one.x - x) ** 2 + (one.y - y) ** 2 for one in known]
    if min(squares) > (_REACH + _MARGIN) ** 2:
        return None
    weights = [1 / (square + 1e-6) for square in squares]
    total = sum(weight * one.value for weight, one in zip(weights, known, strict=True))
    return total / sum(weights)
