"""What several seeds say: the winner beside the baselines, and what may be claimed of the difference."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from crab.report.plots import Area
from crab.report.scales import range_over, short, word
from crab.report.sweep_trials import Confirmed, Sweep
from crab.report.sweep_views import Axis, ConfirmedRow, Dots, Headline, Label, Seeds
from crab.report.texts import UNKNOWN, clean

WINNER = "winner"
_ROW = 34.0


def headline(sweep: Sweep) -> Headline | None:
    """The best trial; None where no trial has a value."""
    trial = sweep.winner
    if trial is None or trial.best is None:
        return None
    compared = sum(other.counts for other in sweep.trials)
    remark = "It is the only trial with a value."
    if compared > 1:
        remark = (
            f"The best of {compared} trials owes part of its lead to luck: what it is worth is what further seeds"
            " say."
        )
    return Headline(
        trial=trial.name,
        key=trial.key,
        value=short(trial.best),
        config=settings(trial.config),
        remark=remark,
    )


def settings(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, value) of a configuration, in its order."""
    return tuple((clean(str(name)), word(value)) for name, value in config.items())


def rows(sweep: Sweep) -> tuple[ConfirmedRow, ...]:
    """The confirmed configurations in figures."""
    return tuple(
        ConfirmedRow(
            label=one.label,
            config=", ".join(f"{name} = {value}" for name, value in settings(one.config)),
            mean=_mean(one),
            seeds=_seeds(one),
            values=", ".join(UNKNOWN if value is None else short(value) for value in one.values),
        )
        for one in sweep.confirmed
    )


def _mean(one: Confirmed) -> str:
    if one.mean is None:
        return UNKNOWN
    spread = f" ± {one.std:#.2g}" if one.std is not None and len(one.finite) > 1 else ""
    return short(one.mean) + spread


def _seeds(one: Confirmed) -> str:
    count, known = len(one.values), len(one.finite)
    return f"{count}" if known == count else f"{known} of {count}"


def verdicts(sweep: Sweep) -> tuple[str, ...]:
    """A sentence for each baseline, which claims no more than the seeds do."""
    winner = next((one for one in sweep.confirmed if one.label == WINNER), None)
    if winner is None and sweep.winner is None:
        return ()
    if winner is None:
        return ("No seeds were run to confirm the best trial: its value stands for one run.",)
    others = [one for one in sweep.confirmed if one is not winner]
    said = [_verdict(sweep, winner, other) for other in others]
    said = said or ["There is no baseline to compare the winner with."]
    trial = next((trial for trial in sweep.trials if trial.config == winner.config), None)
    best = sweep.winner
    if trial and best and trial.config != best.config:
        said.insert(0, f"The winner that was confirmed is trial {trial.name}, not the best one.")
    return tuple(said)


def _verdict(sweep: Sweep, winner: Confirmed, other: Confirmed) -> str:
    lost = [
        f"{len(one.values) - len(one.finite)} of {len(one.values)} seeds of {name} gave no value"
        for one, name in ((winner, "the winner"), (other, other.label))
        if len(one.finite) < len(one.values)
    ]
    if not winner.finite or not other.finite or lost:
        why = "; ".join(lost) or "one of them has no seeds"
        return f"The winner and {other.label} cannot be compared: {why}."
    ours, theirs = winner.finite, other.finite
    counts = f"{_count(ours)} against {_count(theirs)}"
    worst, best = sweep.worst_of(ours), sweep.best_of(theirs)
    if sweep.is_better(worst, best):
        said = (
            f"The winner's worst seed ({short(worst)}) is better than the best seed of {other.label} ({short(best)}),"
            f" {counts}."
        )
    elif sweep.is_better(sweep.worst_of(theirs), sweep.best_of(ours)):
        said = (
            f"The worst seed of {other.label} ({short(sweep.worst_of(theirs))}) is better than the winner's best"
            f" ({short(sweep.best_of(ours))}), {counts}: the sweep found nothing better than this baseline."
        )
    else:
        return (
            f"The spreads of the winner ({_span(ours)}) and {other.label} ({_span(theirs)}) overlap, {counts}: these"
            " seeds show no difference."
        )
    if min(len(ours), len(theirs)) < 2:
        said += " One seed shows no spread, so this may be chance."
    return said


def _count(values: Sequence[float]) -> str:
    return f"{len(values)} seed{'s' if len(values) > 1 else ''}"


def _span(values: Sequence[float]) -> str:
    return f"{short(min(values))} to {short(max(values))}" if len(values) > 1 else short(values[0])


def seeds(sweep: Sweep) -> Seeds | None:
    """Every seed as a dot; None where none has a value."""
    values = [value for one in sweep.confirmed for value in one.finite]
    if not values:
        return None
    means = [one.mean for one in sweep.confirmed if one.mean is not None]
    spreads = [spread for one in sweep.confirmed if (spread := _spread(one))]
    scale = range_over([*values, *means, *(end for spread in spreads for end in spread)])
    area = Area(
        width=620.0,
        height=_ROW * len(sweep.confirmed) + 74.0,
        left=150.0,
        top=6.0,
        pad=10.0,
    )

    def place(value: float) -> float:
        return area.x(scale.share(value) or 0.0)

    found = []
    for index, one in enumerate(sweep.confirmed):
        spread = _spread(one)
        found.append(
            Dots(
                y=area.top + area.pad + _ROW * (index + 0.5),
                label=one.label,
                winner=one.label == WINNER,
                dots=tuple(
                    Label(at=place(value), text=f"seed {seed}: {short(value)}")
                    for seed, value in zip_longest(one.seeds, one.values, fillvalue=None)
                    if value is not None
                ),
                mean=place(one.mean) if one.mean is not None else None,
                spread=(place(spread[0]), place(spread[1])) if spread else None,
            )
        )
    return Seeds(
        plot=area.plot(area.x_axis(sweep.metric_title, scale), Axis(title="")), rows=tuple(found)
    )


def _spread(one: Confirmed) -> tuple[float, float] | None:
    """mean - std and mean + std; None where one seed, or none, has a value."""
    if one.mean is None or one.std is None or len(one.finite) < 2:
        return None
    return one.mean - one.std, one.mean + one.std
