"""What the page of a sweep says: numbers of the record, places on axes, claims no larger than the seeds allow."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.elements import Elements
from support.sweeps import HOSTILE, MAX_STEPS, asha_sweep, confirmed, stopped, sweep, trial

from crab.report.colours import LEVELS, distance, levels
from crab.report.scales import Choices, limits, range_over
from crab.report.sweep import sweep_page
from crab.report.sweep_timeline import lanes
from crab.report.sweep_views import Axis, Mark, Response, SweepPage
from jobs.sweep_report import make_sweep_report

NAN, INF = float("nan"), float("inf")
CORNERS = ((1, 0.1), (1, 10.0), (8, 0.1), (8, 10.0))
"""Of the space of heads and temperature."""


def at(axis: Axis, text: str) -> float:
    """The pixel of a label."""
    return next(label.at for label in axis.labels if label.text == text)


def response(page: SweepPage) -> Response:
    assert page.response is not None
    return page.response


def marks(page: SweepPage) -> dict[int, Mark]:
    return {mark.key: mark for mark in response(page).marks}


def corners(**changes: Any) -> list[dict[str, Any]]:
    """A completed trial at each corner of the space, with values 1.0, 1.1, 1.2 and 1.3."""
    return [
        trial(
            n,
            config={"num_heads": heads, "router_temperature": temperature},
            **{"best": 1 + n / 10, "curve": [[60, 1 + n / 10]], **changes},
        )
        for n, (heads, temperature) in enumerate(CORNERS)
    ]


def level_at(page: SweepPage, x: float, y: float) -> int | None:
    """Of the surface at a pixel."""
    surface = response(page).surface
    assert surface is not None
    reached = any(
        ((x - px) / surface.rx) ** 2 + ((y - py) / surface.ry) ** 2 <= 1
        for px, py in surface.places
    )
    for cell in reversed(surface.cells):  # later ones lie on top
        if cell.x <= x < cell.x + cell.width and cell.y <= y < cell.y + cell.height:
            return cell.level if reached else None
    return None


def test_trials_stand_at_their_parameters() -> None:
    middle = trial(4, config={"num_heads": 3, "router_temperature": 1.0})
    page = sweep_page(sweep([*corners(), middle]))
    found, plot = marks(page), response(page).plot
    assert plot.x.title == "num_heads (whole number)"
    assert plot.y.title == "router_temperature (number, log scale)"
    for n, (heads, temperature) in enumerate(CORNERS):
        assert found[n].x == pytest.approx(at(plot.x, f"{heads}"))
        assert found[n].y == pytest.approx(at(plot.y, f"{temperature:g}"))
    assert found[4].x == pytest.approx(at(plot.x, "3"))
    assert found[4].y == pytest.approx(
        (found[0].y + found[1].y) / 2, abs=0.1
    )  # half of two decades
    assert found[0].x < found[2].x
    assert found[1].y < found[0].y  # upwards


def test_heads_and_temperature_are_preferred_to_the_first_two() -> None:
    config = {"learning_rate": 1e-3, "num_heads": 3, "dropout": 0.1, "router_temperature": 1.0}
    space = {name: {"kind": "float", "low": 1e-4, "high": 10.0, "log": True} for name in config}
    plot = response(sweep_page(sweep([trial(0, config=config)], space=space))).plot
    assert (plot.x.title.split()[0], plot.y.title.split()[0]) == ("num_heads", "router_temperature")
    del space["num_heads"]
    # What configurations set beside the space was not searched: it has a column and no axis.
    page = sweep_page(sweep([trial(0, config=config)], space=space))
    assert response(page).plot.x.title.split()[0] == "learning_rate"
    assert "num_heads" in [name for name, _ in page.columns]
    assert page.parallel is not None
    assert "num_heads" not in [axis.name for axis in page.parallel.axes]


def test_one_number_is_drawn_against_the_metric() -> None:
    space = {"rate": {"kind": "float", "low": 0.0, "high": 1.0, "log": False}}
    trials = [trial(n, config={"rate": n / 4}, best=1.0 + n) for n in range(5)]
    trials.append(trial(5, config={"rate": 0.5}, status="failed", best=None))
    page = sweep_page(sweep(trials, space=space))
    found, plot = marks(page), response(page).plot
    assert [found[n].y for n in (0, 2)] == [at(plot.y, "1"), at(plot.y, "3")]
    assert found[5].y == found[4].y  # no value: at the worse edge
    assert "1 trial without a value" in response(page).caption
    assert response(page).surface is None


def test_without_numbers_there_is_no_response() -> None:
    space = {"targets": {"kind": "choice", "choices": ["attention", "all"]}}
    page = sweep_page(sweep([trial(0, config={"targets": "all"})], space=space))
    assert page.response is None
    assert page.parallel is not None


def test_marks_tell_value_budget_and_end() -> None:
    trials = [*corners(), stopped(4), stopped(5, 40), trial(6, status="failed", best=0.1)]
    page = sweep_page(sweep(trials))
    found = marks(page)
    assert found[0].level == LEVELS - 1
    values = [found[n].level for n in range(4)]
    assert values == sorted(values, key=lambda level: -(level or 0))
    assert found[0].r > found[5].r > found[4].r
    assert [found[n].status for n in (0, 4, 6)] == ["completed", "stopped", "failed"]
    assert found[6].level is None
    assert page.headline is not None
    assert page.headline.trial == "0"  # the failed one's value counts for nothing
    assert response(page).best == found[0]


def test_the_surface_is_of_those_that_reached_the_last_rung() -> None:
    alone = sweep_page(sweep(corners()))
    for mark in response(alone).marks:
        assert level_at(alone, mark.x, mark.y) == mark.level
    # A stopped one in a corner, as good as it may be, says nothing of what step 60 would have been.
    early = stopped(4, config={"num_heads": 1, "router_temperature": 0.1}, best=1.3)
    both = sweep_page(sweep([*corners(), early]))
    assert response(both).surface == response(alone).surface
    assert "the 4 trials that reached step 60" in response(both).caption
    plot = response(alone).plot
    assert level_at(alone, (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2) is None


@pytest.mark.parametrize(
    "last",
    [
        stopped(3),
        trial(3, status="failed"),
        trial(3, best=NAN, curve=[[60, NAN]]),
        trial(3, config={"num_heads": 3}),
    ],
)
def test_fewer_than_four_make_no_surface(last: dict[str, Any]) -> None:
    page = sweep_page(sweep([*corners()[:3], last]))
    assert response(page).surface is None
    assert "3 of the trials shown reached the last rung" in response(page).caption


@pytest.mark.parametrize("dark", [False, True])
def test_colours_go_in_even_steps_away_from_the_paper(dark: bool) -> None:
    found = levels(dark)
    steps = [distance(one, other) for one, other in pairwise(found)]
    assert max(steps) < 1.2 * min(steps)
    ink = [distance(colour, "#ffffff" if dark else "#000000") for colour in found]
    assert ink == sorted(ink, reverse=True)
    paper = "#161514" if dark else "#fbfaf8"
    assert distance(found[-1], paper) > 0.6 > 0.15 < distance(found[0], paper)


def test_a_diverged_trial_leaves_the_others_their_colours() -> None:
    trials = [trial(n, best=1 + n / 10) for n in range(10)]
    usual = sweep_page(sweep(trials))
    page = sweep_page(sweep([*trials, trial(10, best=1e6)]))
    assert len({mark.level for mark in response(page).marks}) == 10
    assert marks(page)[10].level == 0
    assert usual.key == ("1.900", "1.000")
    assert page.key == ("1.900 and worse", "1.000")


def test_more_is_better_where_the_mode_says_so() -> None:
    trials = [trial(n, best=value) for n, value in enumerate((0.5, 0.9, 0.7))]
    page = sweep_page(sweep(trials, mode="max", metric="val/accuracy"))
    assert page.headline is not None
    assert (page.headline.trial, page.headline.value) == ("1", "0.9000")
    assert marks(page)[1].level == LEVELS - 1
    assert marks(page)[0].level == 0
    assert ("metric", "val/accuracy, higher is better") in page.facts


def test_curves_run_over_steps_and_end_where_they_were_stopped() -> None:
    page = sweep_page(sweep([trial(0), stopped(1), stopped(2, 40), stopped(3)])).curves
    assert page is not None
    ends = {mark.key: mark for mark in page.ends}
    assert ends[0].x == at(page.plot.x, "60")
    assert ends[1].x == at(page.plot.x, "20")
    assert ends[1].y == ends[3].y < ends[2].y < ends[0].y
    assert [(rung.at, rung.text) for rung in page.rungs] == [
        (at(page.plot.x, "20"), "2 stopped"),
        (at(page.plot.x, "40"), "1 stopped"),
    ]
    (points,) = next(line for line in page.lines if line.key == 0).parts
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in places] == [at(page.plot.x, text) for text in ("20", "40", "60")]
    assert places[0][1] == at(page.plot.y, "2.0")
    assert places[2] == (ends[0].x, ends[0].y)
    assert page.best == ends[0]


def test_a_curve_breaks_where_a_value_is_not_finite() -> None:
    curve = [[10, 3.0], [20, 2.0], [30, NAN], [40, 1.5], [50, 1.4], [60, None]]
    page = sweep_page(sweep([trial(0, curve=curve)])).curves
    assert page is not None
    assert [len(part.split()) for part in page.lines[0].parts] == [2, 2]
    assert page.ends[0].x == at(page.plot.x, "50")


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    curve = [[step, 1000.0 - step] for step in range(1, 1001)]
    page = sweep_page(sweep([trial(0, curve=curve)], max_steps=1000)).curves
    assert page is not None
    points = page.lines[0].parts[0].split()
    assert len(points) < 150
    assert float(points[-1].split(",")[0]) == at(page.plot.x, "1000")


def test_parallel_coordinates_go_through_all_parameters_to_the_value() -> None:
    targets = ["attention", "mlp", "all", None]
    space = {
        "num_heads": {"kind": "int", "low": 1, "high": 8, "log": False},
        "targets": {"kind": "choice", "choices": targets},
    }
    trials = [
        trial(n, config={"num_heads": 1 + n, "targets": one}, best=1 + n / 10)
        for n, one in enumerate(targets[:3])
    ]
    trials.append(trial(3, config={"targets": "all"}))
    trials.append(trial(4, config={"num_heads": 1, "targets": "all"}, status="failed", best=None))
    trials.append(trial(5, config={"num_heads": 1}))
    page = sweep_page(sweep(trials, space=space)).parallel
    assert page is not None
    heads, choice, _ = page.axes
    assert [axis.name for axis in page.axes] == ["num_heads", "targets", "best val/loss"]
    lines = {line.key: line for line in page.lines}
    places = [tuple(map(float, point.split(","))) for point in lines[1].parts[0].split()]
    assert [x for x, _ in places] == [axis.x for axis in page.axes]
    labels = {label.text: label.at for label in (*heads.labels, *choice.labels)}
    assert [y for _, y in places[:2]] == [labels["2"], labels["mlp"]]
    assert labels["mlp"] == pytest.approx((labels["attention"] + labels["all"]) / 2, abs=0.1)
    assert "null" in labels
    assert [len(part.split()) for part in lines[3].parts] == [2]  # without heads
    assert [len(part.split()) for part in lines[4].parts] == [2]  # without a value
    assert lines[4].level is None
    assert lines[5].parts == ()  # lacking a choice is not the choice of null


WINNER = confirmed("winner", [1.39, 1.41, 1.40])


@pytest.mark.parametrize(
    ("other", "mode", "words"),
    [
        (
            [1.52, 1.51, 1.53],
            "min",
            "worst seed (1.410) is better than the best seed of base (1.510)",
        ),
        ([1.40, 1.42, 1.45], "min", "(1.390 to 1.410) and base (1.400 to 1.450) overlap"),
        ([1.41, 1.42, 1.45], "min", "overlap"),  # worst and best seed are the same
        ([1.30, 1.35, 1.36], "min", "found nothing better than this baseline"),
        (
            [1.30, 1.35, 1.36],
            "max",
            "worst seed (1.390) is better than the best seed of base (1.360)",
        ),
        ([1.52, 1.51, 1.53], "max", "found nothing better than this baseline"),
        ([1.52], "min", "One seed shows no spread"),
        ([1.52, NAN, 1.53], "min", "cannot be compared: 1 of 3 seeds of base gave no value"),
        ([NAN, INF], "min", "cannot be compared: 2 of 2 seeds of base"),
        ([], "min", "cannot be compared"),
    ],
)
def test_claims_are_no_larger_than_the_seeds_allow(
    other: list[float], mode: str, words: str
) -> None:
    baseline = {"label": "base", "config": {}, "seeds": [], "values": other, "mean": None}
    page = sweep_page(sweep([trial(0)], mode=mode, confirmed=[WINNER, baseline]))
    (verdict,) = page.verdicts
    assert words in verdict
    better = "better than the best seed" in verdict
    assert better == ("worst seed (" in words or words.startswith("One seed"))


def test_seeds_stand_on_the_axis_with_their_mean_and_spread() -> None:
    page = sweep_page(sweep([trial(0)], confirmed=[WINNER, confirmed("n=1", [1.50, 1.60])]))
    assert page.seeds is not None
    winner, other = page.seeds.rows
    axis = page.seeds.plot.x
    assert axis.title == "val/loss (lower is better)"
    assert [dot.at for dot in other.dots] == [at(axis, "1.50"), at(axis, "1.60")]
    assert other.mean == at(axis, "1.55")
    assert winner.spread is not None
    assert winner.mean == pytest.approx(sum(winner.spread) / 2, abs=0.1)
    assert winner.dots[0].text == "seed 1: 1.390"
    assert [(row.label, row.mean, row.seeds, row.values) for row in page.confirmed] == [
        ("winner", "1.400 ± 0.010", "3", "1.390, 1.410, 1.400"),
        ("n=1", "1.550 ± 0.071", "2", "1.500, 1.600"),
    ]


def test_one_seed_has_no_spread() -> None:
    page = sweep_page(sweep([trial(0)], confirmed=[confirmed("winner", [1.4])]))
    assert page.seeds is not None
    assert page.seeds.rows[0].spread is None
    assert page.confirmed[0].mean == "1.400"
    assert page.verdicts == ("There is no baseline to compare the winner with.",)


def test_a_winner_that_is_not_the_best_trial_is_named() -> None:
    trials = corners()
    for best, words in (
        (0, ()),
        (2, ("The winner that was confirmed is trial 2, not the best one.",)),
    ):
        chosen = {**WINNER, "config": trials[best]["config"]}
        page = sweep_page(sweep(trials, confirmed=[chosen, confirmed("base", [2.0, 2.1])]))
        assert page.verdicts[:-1] == words


def test_what_was_saved_is_missing_steps_at_the_measured_speed() -> None:
    trials = [
        trial(0, seconds=60.0),
        stopped(1, 20, seconds=20.0, cost=0.2),  # 40 steps at 1 s
        stopped(2, 40, seconds=80.0, cost=0.8),  # 20 steps at 2 s
    ]
    page = sweep_page(sweep(trials))
    assert "saved about 80.0 s of trial time and 0.8 USD, 33% of" in page.saved
    assert "estimate" in page.saved
    assert page.spending is not None
    bars = {bar.key: bar for bar in page.spending.bars}
    assert bars[1].rest == pytest.approx(2 * bars[1].height, abs=0.2)
    assert bars[2].rest == pytest.approx(bars[2].height / 2, abs=0.2)
    assert bars[0].rest == 0
    axis = page.spending.plot.y
    assert bars[2].y == pytest.approx(at(axis, "80"), abs=0.2)
    assert bars[2].y + bars[2].height == pytest.approx(at(axis, "0"), abs=0.2)
    # Without seconds of its own, a trial is taken to be as fast as the usual one: 1 s a step.
    unknown = sweep_page(sweep([*trials[:2], stopped(2, 40, seconds=None, cost=None)]))
    assert "saved about 60.0 s of trial time, " in unknown.saved
    assert (
        sweep_page(sweep([trial(0)])).saved == "No trial was stopped early, so nothing was saved."
    )
    assert "cannot be estimated" in sweep_page(sweep([stopped(0, seconds=None)])).saved


def test_costs_are_those_of_the_record() -> None:
    costs = sweep_page(sweep([trial(0, seconds=30.0, cost=0.01), trial(1, seconds=90.0)])).costs
    assert costs == (
        ("money in all", "0.048 USD"),
        ("wall time", "15.0 min"),
        ("CPU hours", "0.2"),
        ("GPU hours", "0"),
        ("all trials", "120.0 s, 0.012 USD"),
        ("a trial, on average", "60.0 s, 0.006 USD"),
    )
    spent = {"cpu_hours": NAN, "gpu_hours": None, "money": None, "currency": None}
    none = sweep_page(sweep([trial(0, seconds=None, cost=None)], spent=spent))
    assert none.costs == (("money in all", "no prices"),)


def test_bars_lie_between_start_and_end() -> None:
    start = datetime(2026, 11, 30, 22, tzinfo=UTC)

    def clock(seconds: int) -> str:
        return (start + timedelta(seconds=seconds)).isoformat()

    trials = [
        trial(0, started=clock(0), ended=clock(100)),
        stopped(1, started="2026-11-30T22:00:20", ended="2026-11-30T22:01:00Z"),
        trial(2, status="unfinished", started=clock(60), ended=None),
        trial(3, status="refused", started=None, ended=None, reason="does not fit"),
        trial(4, status="failed", started=clock(50), ended=clock(40), reason="boom"),
    ]
    page = sweep_page(sweep(trials))
    assert page.timeline is not None
    axis, bars = page.timeline.plot.x, {bar.key: bar for bar in page.timeline.bars}
    assert axis.title == "time since the first start (seconds)"
    assert (bars[0].x, bars[0].x + bars[0].width) == (at(axis, "0"), at(axis, "100"))
    assert bars[1].x == at(axis, "20")
    assert bars[1].x + bars[1].width == pytest.approx(at(axis, "60"), abs=0.1)
    assert bars[2].open_end
    assert bars[2].x + bars[2].width == pytest.approx(at(axis, "100"), abs=0.1)
    assert bars[4].width < 3  # ended before it began: a clock was set
    assert [bars[n].y for n in (0, 1, 4, 2)] == sorted(bar.y for bar in bars.values())
    assert "Not shown, as their start is not known: 1 trial." in page.timeline.caption
    assert [stop[:2] for stop in page.stops] == [
        ("4", "failed"),
        ("1", "stopped"),
        ("2", "unfinished"),
        ("3", "refused"),
    ]
    assert "after 20 steps: stopped by asha" in page.stops[1][2]


def test_rows_are_shared_by_trials_that_do_not_overlap() -> None:
    start = datetime(2026, 11, 30, tzinfo=UTC)
    spans = [(0, 10), (0, 4), (4, 8), (5, 6), (10, 12)]
    found = lanes([(start + timedelta(seconds=a), start + timedelta(seconds=b)) for a, b in spans])
    assert found == [0, 1, 1, 2, 0]


def test_the_table_has_every_number_and_sorts_by_what_was_rounded() -> None:
    trials = [
        trial(7, best=1.23456789, seconds=31.27, cost=0.00123456, parameters=1234567, failures=2),
        trial(8, best=NAN, config={"num_heads": 3}, parameters=None, seconds=INF),
    ]
    page = sweep_page(sweep(trials))
    names = [name for name, _ in page.columns]
    first, second = (dict(zip(names, row.values, strict=True)) for row in page.rows)
    assert {name: value.text for name, value in first.items()} == {
        "trial": "7",
        "num_heads": "3",
        "router_temperature": "1",
        "status": "completed, 2 failures",
        "steps": "60",
        "best val/loss": "1.235",
        "seconds": "31.3",
        "cost (USD)": "0.00123",
        "parameter count": "1,234,567",
        "reason": "",
    }
    assert float(first["best val/loss"].sort) == 1.23456789
    unknown = ("router_temperature", "best val/loss", "seconds", "parameter count")
    assert {(second[name].text, second[name].sort) for name in unknown} == {("\N{EN DASH}", "")}


def test_the_head_says_what_was_swept() -> None:
    page = sweep_page(asha_sweep(stopped_because="the budget of 0.05 USD is spent"))
    assert page.summary == "24 trials: 4 completed, 18 stopped, 1 failed, 1 refused."
    assert page.remarks[0].endswith("the budget of 0.05 USD is spent")
    facts = dict(page.facts)
    assert (facts["scheduler"], facts["seed"], facts["max steps"]) == ("asha", "1", str(MAX_STEPS))
    assert ("5f" * 32).startswith(facts["manifest"])
    assert dict(page.space)["targets"] == "one of attention, all"


HOSTILE_SWEEP = sweep(
    [
        stopped(
            HOSTILE,  # type: ignore[arg-type]
            status=HOSTILE,
            reason=HOSTILE,
            node=HOSTILE,
            config={HOSTILE: HOSTILE, "num_heads": HOSTILE},
        ),
        trial(1, config={HOSTILE: [HOSTILE, 1], "num_heads": 3}),
    ],
    name=HOSTILE,
    metric=HOSTILE,
    scheduler=HOSTILE,
    adapter=HOSTILE,
    stopped_because=HOSTILE,
    space={
        HOSTILE: {"kind": "choice", "choices": [HOSTILE, {HOSTILE: HOSTILE}]},
        "num_heads": {"kind": "int", "low": HOSTILE, "high": 8, "log": HOSTILE},
    },
    confirmed=[
        {**WINNER, "config": {HOSTILE: HOSTILE}},
        {"label": HOSTILE, "config": {}, "seeds": [HOSTILE], "values": [1.4], "mean": 1.4},
    ],
    capacity={"max_concurrent": HOSTILE, "sentence": HOSTILE},
    spent={"currency": HOSTILE, "money": 1.0, "cpu_hours": HOSTILE},
)


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    seen = Elements(make_sweep_report(HOSTILE_SWEEP, tmp_path))
    assert [tag for tag, _ in seen.found if tag == "script"] == ["script"]
    assert not {tag for tag, _ in seen.found} & {"img", "iframe", "object", "link"}
    assert [attrs for _, attrs in seen.found if any(n.startswith("on") for n in attrs)] == []
    assert seen.text.count('<script>document.title = "owned"</script>') > 10


def test_only_our_script_may_run(tmp_path: Path) -> None:
    page = make_sweep_report(asha_sweep(), tmp_path)
    policy = next(a for _, a in Elements(page).found if a.get("http-equiv"))["content"]
    found = re.search(r"<script>(.*)</script>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'")


FAILED = [
    trial(n, status="failed", reason="boom", best=None, last=None, curve=[], steps=0, seconds=None)
    for n in range(5)
]
ODD: dict[str, dict[str, Any]] = {
    "nothing": sweep([], space={}, spent={}, capacity={}, max_steps=0),
    "none tried": sweep([]),
    "one": sweep([trial(0)]),
    "all failed": sweep(FAILED),
    "all the same": sweep([trial(n) for n in range(6)], confirmed=[WINNER, WINNER]),
    "no config": sweep([trial(0, config={}), trial(1, config={})], space={}),
    "not finite": sweep(
        [
            trial(
                n,
                best=value,
                last=value,
                curve=[[20, value], [60, value]],
                seconds=value,
                cost=value,
            )
            for n, value in enumerate((NAN, INF, -INF, None, 1.5, 1e300, -1e300, 1e99, True))
        ],
        confirmed=[{**WINNER, "values": [NAN, INF, None], "mean": NAN, "std": INF}],
        spent={"money": NAN, "wall_seconds": INF, "cpu_hours": None, "currency": None},
    ),
    "odd spaces": sweep(
        [trial(0, config={"a": 0.0, "b": 5, "c": [1, 2], "d": "x"}), trial(1, config={"a": NAN})],
        space={
            "a": {"kind": "float", "low": 0.0, "high": 1.0, "log": True},
            "b": {"kind": "int", "low": 5, "high": 5, "log": False},
            "c": {"kind": "choice", "choices": [[1, 2], None, True, "true"]},
            "d": {"kind": "choice", "choices": []},
            "e": {"kind": "something new"},
            "f": {"kind": "float", "low": 1e-300, "high": 1e300, "log": True},
        },
    ),
    "negative steps": sweep([trial(0, steps=-5, curve=[[-5, 1.0]], seconds=-1.0)], max_steps=None),
    "no times": sweep([trial(0, started="yesterday", ended=5), trial(1, started=None)]),
    "hostile": HOSTILE_SWEEP,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sweeps_have_whole_pages(tmp_path: Path, name: str) -> None:
    for mode in ("min", "max"):
        page = make_sweep_report({**ODD[name], "mode": mode}, tmp_path)
        drawn = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height")
        found = [
            (tag, key, value)
            for tag, attrs in Elements(page).found
            for key, value in attrs.items()
            if key in drawn and not math.isfinite(float(value or "nan"))
        ]
        assert found == []
        assert re.findall(r'(?:points|d)="[^"]*(?:nan|inf)', page.read_text(encoding="utf-8")) == []
        wide = [
            a for tag, a in Elements(page).found if tag == "rect" and float(a["width"] or 0) < 0
        ]
        assert wide == []


def test_the_best_is_known_though_others_are_not_finite() -> None:
    page = sweep_page(ODD["not finite"])
    assert page.headline is not None
    assert page.headline.trial == "4"


def test_five_hundred_trials_stay_small(tmp_path: Path) -> None:
    page = make_sweep_report(asha_sweep(500), tmp_path)
    assert page.stat().st_size < 2_000_000
    assert sum(tag == "tr" for tag, _ in Elements(page).found) > 500
    timeline = sweep_page(asha_sweep(500)).timeline
    assert timeline is not None
    assert len({bar.y for bar in timeline.bars}) == 2  # two ran at a time


def test_a_page_is_one_file_and_takes_the_old_ones_place(tmp_path: Path) -> None:
    page = make_sweep_report(sweep([trial(0)]), tmp_path)
    assert page == tmp_path / "report" / "index.html"
    old = page.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="mode is 'best', expected 'min' or 'max'"):
        make_sweep_report(sweep([trial(0)], mode="best"), tmp_path)
    with pytest.raises(ValueError, match=r"no 'trials'; give the sweep\.json"):
        make_sweep_report({"name": "a", "metric": "b", "mode": "min"}, tmp_path)
    assert page.read_text(encoding="utf-8") == old
    make_sweep_report(sweep([trial(0), trial(1)]), tmp_path)
    assert page.read_text(encoding="utf-8") != old
    assert [path.name for path in tmp_path.rglob("*")] == ["report", "index.html"]


@pytest.mark.parametrize(
    ("values", "log", "whole", "texts"),
    [
        ([0, 60], False, True, ["0", "10", "20", "30", "40", "50", "60"]),
        ([1, 3], False, True, ["1", "2", "3"]),
        (
            [1.38, 1.52],
            False,
            False,
            ["1.38", "1.40", "1.42", "1.44", "1.46", "1.48", "1.50", "1.52"],
        ),
        ([0.1, 10], True, False, ["0.1", "0.2", "0.5", "1", "2", "5", "10"]),
        ([1e-5, 1e-1], True, False, ["1e-05", "0.0001", "0.001", "0.01", "0.1"]),
        ([-1, 1], True, False, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),  # no log axis has -1
        ([5, 5], False, True, ["4", "5", "6"]),
    ],
)
def test_ticks_are_round(values: list[float], log: bool, whole: bool, texts: list[str]) -> None:
    scale = range_over(values, log, whole)
    assert [tick.text for tick in scale.ticks()] == texts
    assert [tick.share for tick in scale.ticks()] == pytest.approx(
        [scale.share(float(text)) for text in texts]
    )


def test_choices_lie_at_even_distances() -> None:
    scale = Choices(names=("a", "b", "c"))
    assert [scale.share(name) for name in ("a", "b", "c", "d")] == [0.0, 0.5, 1.0, None]
    assert Choices(names=("a",)).share("a") == 0.5


def test_axes_end_before_what_lies_far_off() -> None:
    usual = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
    assert limits([*usual, 2.5], lower_is_better=True) == (1.0, 2.5)
    assert limits([*usual, 99.0], lower_is_better=True) == (1.0, 1.9)
    assert limits([*usual, -99.0], lower_is_better=False) == (1.9, 1.0)
    assert limits([], lower_is_better=True) is None
