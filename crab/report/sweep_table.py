"""All trials in figures: a row each, sortable where scripts run."""

from crab.report.scales import number, short, word
from crab.report.sweep_trials import Sweep, Trial
from crab.report.sweep_views import Row, Value
from crab.report.texts import UNKNOWN


def columns(sweep: Sweep) -> tuple[tuple[str, bool], ...]:
    """(heading, whether numbers stand below it)."""
    cost = f"cost ({sweep.currency})" if sweep.currency else "cost"
    return (
        ("trial", True),
        *((parameter.name, parameter.numeric) for parameter in sweep.parameters),
        ("status", False),
        ("steps", True),
        (f"best {sweep.metric}", True),
        ("seconds", True),
        (cost, True),
        ("parameter count", True),
        ("reason", False),
    )


def rows(sweep: Sweep) -> tuple[Row, ...]:
    """In the order of the file; `sort` of a cell is its value without rounding."""
    return tuple(
        Row(key=trial.key, status=trial.status, values=_values(sweep, trial))
        for trial in sweep.trials
    )


def _values(sweep: Sweep, trial: Trial) -> tuple[Value, ...]:
    settings = []
    for parameter in sweep.parameters:
        if parameter.key not in trial.config:
            settings.append(Value(text=UNKNOWN, sort="", numeric=parameter.numeric))
            continue
        value = trial.config[parameter.key]
        known = number(value)
        sort = word(value) if known is None else repr(known)
        settings.append(Value(text=word(value), sort=sort, numeric=parameter.numeric))
    status = trial.status
    if trial.failures:
        status += f", {trial.failures} failure{'s' if trial.failures > 1 else ''}"
    return (
        Value(text=trial.name, sort=trial.name),
        *settings,
        Value(text=status, sort=status, numeric=False),
        _number(trial.steps, "{:g}"),
        _metric(trial.best),
        _number(trial.seconds, "{:.1f}"),
        _number(trial.cost, "{:.3g}"),
        _number(trial.parameters, "{:,.0f}"),
        Value(text=trial.reason, sort=trial.reason, numeric=False),
    )


def _metric(value: float | None) -> Value:
    return Value(
        text=UNKNOWN if value is None else short(value), sort="" if value is None else repr(value)
    )


def _number(value: float | None, form: str) -> Value:
    if value is None:
        return Value(text=UNKNOWN, sort="")
    return Value(text=form.format(value), sort=repr(value))
