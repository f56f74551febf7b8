"""What a sweep cost, and what early stopping saved: an estimate from the speed that was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from crab.report.plots import Area, spaced
from crab.report.scales import number, range_over
from crab.report.sweep_timeline import duration, unit_of
from crab.report.sweep_trials import Sweep, Trial
from crab.report.sweep_views import Axis, Bar, Bars, Label

_AREA = Area(width=1000.0, height=280.0, top=10.0, pad=4.0)


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What stopped trials would have taken up to the last step."""

    seconds: Mapping[int, float]
    """By key of the trial."""
    money: float | None
    """None where the cost of any of them is not known."""
    unknown: int
    """Stopped trials of which nothing can be said: no speed was measured."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


def saving(sweep: Sweep) -> Saving:
    """Missing steps times seconds a step: the trial's own, or the median of all where it has none."""
    speeds = [speed for trial in sweep.trials if (speed := _seconds_a_step(trial)) is not None]
    usual = median(speeds) if speeds else None
    seconds: dict[int, float] = {}
    money: float | None = 0.0
    unknown = 0
    for trial in sweep.trials:
        missing = sweep.max_steps - trial.steps
        if trial.status != "stopped" or missing <= 0:
            continue
        own = _seconds_a_step(trial)
        speed = own if own is not None else usual
        if speed is None:
            unknown += 1
            continue
        seconds[trial.key] = missing * speed
        if money is not None and trial.cost is not None and trial.seconds:
            money += seconds[trial.key] * trial.cost / trial.seconds
        else:
            money = None
    return Saving(seconds=seconds, money=money if seconds else None, unknown=unknown)


def saved_words(sweep: Sweep) -> str:
    """What was saved, and that it is an estimate."""
    found = saving(sweep)
    if not found.seconds and not found.unknown:
        return "No trial was stopped early, so nothing was saved."
    if not found.seconds:
        return "What early stopping saved cannot be estimated: no trial has both steps and seconds."
    ran = sum(trial.seconds or 0.0 for trial in sweep.trials)
    share = found.total_s / (found.total_s + ran)
    money = f" and {_money(found.money, sweep.currency)}" if found.money is not None else ""
    said = (
        f"Early stopping saved about {duration(found.total_s)} of trial time{money}, {share:.0%} of what every trial"
        f" to step {sweep.max_steps:g} would have taken. This is an estimate: the missing steps of each trial that was"
        f" stopped ({len(found.seconds)}) times the seconds that its steps took, its start included."
    )
    if found.unknown:
        said += f" {found.unknown} more cannot be estimated."
    return said


def figures(sweep: Sweep, spent: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, value): what was spent in all and on a trial."""
    seconds = [trial.seconds for trial in sweep.trials if trial.seconds is not None]
    costs = [trial.cost for trial in sweep.trials if trial.cost is not None]
    wall = number(spent.get("wall_seconds"))
    money = number(spent.get("money"))
    found = [("money in all", _money(money, sweep.currency) if money is not None else "no prices")]
    found += [("wall time", duration(wall))] if wall is not None else []
    for name, key in (("CPU hours", "cpu_hours"), ("GPU hours", "gpu_hours")):
        hours = number(spent.get(key))
        found += [(name, f"{hours:.3g}")] if hours is not None else []
    total, mean = [], []
    if seconds:
        total.append(duration(sum(seconds)))
        mean.append(duration(sum(seconds) / len(seconds)))
    if costs:
        total.append(_money(sum(costs), sweep.currency))
        mean.append(_money(sum(costs) / len(costs), sweep.currency))
    if total:
        found += [("all trials", ", ".join(total)), ("a trial, on average", ", ".join(mean))]
    return tuple(found)


def spending(sweep: Sweep) -> Bars | None:
    """A bar a trial: what it took, and above it what stopping it saved; None where no time is known."""
    rest = saving(sweep).seconds
    totals = [(trial.seconds or 0.0) + rest.get(trial.key, 0.0) for trial in sweep.trials]
    if not any(totals):
        return None
    unit, length = unit_of(max(totals))
    scale = range_over([0.0, max(totals) / length])
    wide = _AREA.across / len(sweep.trials)

    def height(seconds: float) -> float:
        return round((scale.share(seconds / length) or 0.0) * _AREA.up, 1)

    bars, names = [], []
    for index, trial in enumerate(sweep.trials):
        x = _AREA.left + _AREA.pad + wide * index
        tall = height(trial.seconds or 0.0)
        names.append(Label(at=round(x + wide / 2, 1), text=trial.name))
        thick = min(40.0, 0.8 * wide)
        bars.append(
            Bar(
                key=trial.key,
                x=round(x + (wide - thick) / 2, 1),
                y=round(_AREA.y(0.0) - tall, 1),
                width=round(thick, 1),
                height=tall,
                status=trial.status,
                words=_words(sweep, trial, rest.get(trial.key)),
                rest=height(rest.get(trial.key, 0.0)),
            )
        )
    return Bars(
        plot=_AREA.plot(
            Axis(title="trial", labels=spaced(names)), _AREA.y_axis(f"time ({unit})", scale)
        ),
        bars=tuple(bars),
        caption="Solid: the time that each trial took. Outlined above it: what stopping it saved, an estimate.",
    )


def _words(sweep: Sweep, trial: Trial, saved_s: float | None) -> str:
    lines = [f"trial {trial.name}: {trial.status} after {trial.steps:g} steps"]
    lines += [duration(trial.seconds)] if trial.seconds is not None else []
    lines += [_money(trial.cost, sweep.currency)] if trial.cost is not None else []
    lines += [f"saved about {duration(saved_s)}"] if saved_s else []
    return "\n".join(lines)


def _seconds_a_step(trial: Trial) -> float | None:
    return trial.seconds / trial.steps if trial.seconds is not None and trial.steps > 0 else None


def _money(amount: float, currency: str) -> str:
    return f"{amount:.3g} {currency}".strip()
