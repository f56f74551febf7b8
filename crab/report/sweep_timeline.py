"""When each trial ran and why it ended: a bar a trial over wall time."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from crab.report.plots import Area
from crab.report.scales import range_over
from crab.report.sweep_trials import STATUSES, Sweep, Trial, trials
from crab.report.sweep_views import Axis, Bar, Bars, Label

_WIDTH = 1000.0
_ROW = 18.0
_EACH = 60
"""With more trials than that, those that do not overlap share a row: one a row would be a thin diagonal."""


def timeline(sweep: Sweep) -> Bars | None:
    """The figure; None where no trial says when it started."""
    begun = [(trial.started, trial) for trial in sweep.trials if trial.started is not None]
    if not begun:
        return None
    begun.sort(key=lambda pair: (pair[0], pair[1].key))
    zero = begun[0][0]
    ends = [trial.ended for _, trial in begun if trial.ended is not None]
    last = max([*ends, *(started for started, _ in begun)])
    unit, length = unit_of((last - zero).total_seconds())
    scale = range_over([0.0, (last - zero).total_seconds() / length])
    packed = len(begun) > _EACH
    spans = [(started, max(started, trial.ended or last)) for started, trial in begun]
    rows = lanes(spans) if packed else list(range(len(spans)))
    area = Area(width=_WIDTH, height=_ROW * (max(rows) + 1) + 66.0, top=4.0, pad=4.0)

    def place(at: datetime) -> float:
        return area.x(scale.share((at - zero).total_seconds() / length) or 0.0)

    bars, names = [], {}
    for row, (started, ended), (_, trial) in zip(rows, spans, begun, strict=True):
        top = area.top + area.pad + _ROW * row
        names[row] = Label(at=top + _ROW / 2, text=str(row + 1) if packed else trial.name)
        bars.append(
            Bar(
                key=trial.key,
                x=place(started),
                y=round(top + 0.1 * _ROW, 1),
                width=round(max(1.5, place(ended) - place(started)), 1),
                height=round(0.8 * _ROW, 1),
                status=trial.status,
                words=_words(sweep, trial),
                open_end=trial.ended is None,
            )
        )
    caption = f"{unit.capitalize()} since {zero.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    caption += "; trials that do not overlap share a row." if packed else ", in order of start."
    without, endless = len(sweep.trials) - len(begun), sum(bar.open_end for bar in bars)
    if without:
        caption += f" Not shown, as their start is not known: {trials(without)}."
    if endless:
        caption += f" Pale bars, {endless}: it is not known when they ended."
    return Bars(
        plot=area.plot(
            area.x_axis(f"time since the first start ({unit})", scale),
            Axis(title="row" if packed else "trial", labels=tuple(names.values())),
        ),
        bars=tuple(bars),
        ruled=False,
        crosses=not packed,
        caption=caption,
    )


def lanes(spans: Sequence[tuple[datetime, datetime]]) -> list[int]:
    """For spans in order of their starts: the first row that is free by then."""
    free: list[datetime] = []
    rows = []
    for start, end in spans:
        row = next((row for row, until in enumerate(free) if until <= start), len(free))
        free[row : row + 1] = [end]
        rows.append(row)
    return rows


def _words(sweep: Sweep, trial: Trial) -> str:
    lines = [sweep.words(trial)]
    lines += [f"{duration(trial.seconds)}"] if trial.seconds is not None else []
    lines += [f"on {trial.node}"] if trial.node else []
    lines += [f"{trial.failures} failures"] if trial.failures else []
    return "\n".join(lines)


def summary(sweep: Sweep) -> str:
    """How many trials ended in which way."""
    if not sweep.trials:
        return "No trial was started."
    counts = Counter(trial.status for trial in sweep.trials)
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status]]
    return f"{trials(len(sweep.trials))}: {', '.join(parts)}."


def stops(sweep: Sweep) -> tuple[tuple[str, str, str], ...]:
    """(trial, status, when and why) of every trial that did not complete, in order of their ends."""
    ended = [trial for trial in sweep.trials if trial.status != "completed"]
    never = datetime.max.replace(tzinfo=UTC)
    ended.sort(key=lambda trial: (trial.ended or never, trial.key))
    return tuple(
        (
            trial.name,
            trial.status,
            f"after {trial.steps:g} steps: {trial.reason or 'no reason is known'}",
        )
        for trial in ended
    )


def unit_of(seconds: float) -> tuple[str, float]:
    """(name, length in seconds) of the unit in which a reader measures so long a time."""
    if seconds < 180:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


def duration(seconds: float) -> str:
    """31.2 s, 15.0 min, 2.1 h."""
    unit, length = unit_of(seconds)
    return f"{seconds / length:.1f} {({'seconds': 's', 'minutes': 'min', 'hours': 'h'})[unit]}"
