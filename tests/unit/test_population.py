"""Population based training without Ray: who goes on from whom, with which values, also after kills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search import Searcher

from crab_platform.population import (
    PopulationProposals,
    ReplayProposals,
    generations,
    lineage,
    unneeded,
)
from crab_platform.search import JournaledSearch, OptunaProposals, Propose
from crab_platform.storage import FolderStore
from crab_platform.trial import AVOID, NUMBER, PARENT
from crab_platform.trial_journal import Result, TrialJournal, TrialRecord, read_trials

SPACE = {
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "share": FloatDistribution(0, 1, step=0.25),
    "count": IntDistribution(1, 9),
    "heads": IntDistribution(1, 8),
    "kind": CategoricalDistribution(["a", "b"]),
}
SIZE, PIECE = 8, 5
Show = Callable[[int, dict[str, Any]], float | None]
"""(number, sample) -> what the trial shows at its end; None where it fails for good."""


def population(seed: int = 1) -> PopulationProposals:
    return PopulationProposals(
        draw=OptunaProposals(space=SPACE, searcher="random", metric="loss", mode="min", seed=seed),
        size=SIZE,
        space=SPACE,
        kept=frozenset({"heads"}),
        metric="loss",
        mode="min",
        seed=seed,
    )


def by_number(number: int, sample: dict[str, Any]) -> float:
    """Of the first generation the members 0 and 1 are the best, 6 and 7 the worst."""
    return float(number)


def play(
    folder: Path,
    show: Show,
    count: int,
    *,
    propose: Propose | None = None,
    kill_after: Sequence[int] = (),
    at_a_time: int = 3,
) -> tuple[list[TrialRecord], str | None]:
    """Runs a population whose trials are one result each, so many side by side, the one that was asked last first."""
    store = FolderStore(folder)

    def start() -> JournaledSearch:
        return JournaledSearch(
            store,
            propose or population(),
            num_samples=count,
            examine=lambda _: None,
            metric="loss",
            mode="min",
        )

    search, kills = start(), list(kill_after)
    under_way: list[tuple[str, int, dict[str, Any]]] = []
    over = False
    for turn in range(100 * count):
        while len(under_way) < at_a_time and not over:
            sample = search.suggest(str(turn))
            if sample is None:
                assert under_way, "it waits for nobody"
                break
            if sample == Searcher.FINISHED:
                over = True
                break
            number = sample.pop(NUMBER)
            del sample[AVOID]
            under_way.append((str(turn), number, sample))
            turn += 1000
        if not under_way:
            break
        name, number, sample = under_way.pop()
        journal = TrialJournal(store, number)
        if kills and number == kills[0]:
            kills.pop(0)
            search, under_way, over = start(), [], False
            continue
        value = show(number, sample)
        if value is None:
            journal.finish("failed", "it fails")
        else:
            before = (
                TrialJournal(store, sample[PARENT]).results()[-1].step if PARENT in sample else 0
            )
            if not journal.results():
                journal.append(
                    0,
                    Result(step=before + PIECE, metrics={"loss": value}, seconds=1, node="", at=""),
                )
            journal.finish("completed", "")
        search.on_trial_complete(name)
    return read_trials(store), search.refusal


def test_the_worst_quarter_goes_on_from_the_best_with_other_values(tmp_path: Path) -> None:
    trials, refusal = play(tmp_path, by_number, 2 * SIZE)
    assert refusal is None
    first, second = generations(trials)
    assert len(first) == len(second) == SIZE
    for member, record in enumerate(second[:6]):
        assert record.config == {**first[member].config, PARENT: member}, "it goes on as it was"
    for record in second[6:]:
        parent = first[record.config[PARENT]]
        assert parent.number in (0, 1), "one of the best quarter"
        assert record.config["heads"] == parent.config["heads"], "a shape of weights has changed"
        assert any(record.config[name] != parent.config[name] for name in SPACE)


def test_values_change_by_a_fifth_and_stay_in_their_ranges(tmp_path: Path) -> None:
    """Nine of the population's generations: enough for every kind of change."""
    trials, _ = play(tmp_path, by_number, 9 * SIZE)
    factors, moved, anew = set(), set(), 0
    for record in trials:
        if PARENT not in record.config:
            continue
        parent = trials[record.config[PARENT]].config
        for name, distribution in SPACE.items():
            assert distribution._contains(distribution.to_internal_repr(record.config[name]))
        assert record.config["share"] % 0.25 == 0
        moved.add(record.config["count"] - parent["count"])
        if record.config["rate"] != parent["rate"]:
            factor = round(record.config["rate"] / parent["rate"], 6)
            factors.add(factor)
            anew += factor not in (0.8, 1.2) and record.config["rate"] not in (1e-4, 1e-1)
    assert {0.8, 1.2} <= factors
    assert anew, "nothing was ever drawn anew"
    assert len(moved) > 2


@pytest.mark.parametrize("kills", [(3,), (7, 8), (12, 20), (8, 15, 16, 23)])
def test_a_population_that_was_killed_asks_what_it_would_have_asked(
    tmp_path: Path, kills: Sequence[int]
) -> None:
    whole, _ = play(tmp_path / "whole", by_number, 3 * SIZE)
    killed, _ = play(tmp_path / "killed", by_number, 3 * SIZE, kill_after=kills, at_a_time=2)
    assert [record.config for record in killed] == [record.config for record in whole]
    assert population(2)(0, []) != population(1)(0, [])


def test_whose_member_has_failed_goes_on_from_the_best(tmp_path: Path) -> None:
    """Without an answer of theirs, 0 and 5 cannot be gone on from."""
    trials, _ = play(tmp_path, lambda n, s: None if n in (0, 5) else float(n), 2 * SIZE)
    _, second = generations(trials)
    parents = [record.config[PARENT] for record in second]
    assert parents[1:5] == [1, 2, 3, 4]
    assert {parents[0], parents[5]} <= {1, 2}
    assert not {0, 5} & set(parents)


def test_a_generation_that_fails_ends_the_sweep_with_the_reason(tmp_path: Path) -> None:
    trials, refusal = play(tmp_path, lambda n, s: None if n >= SIZE else float(n), 3 * SIZE)
    assert len(trials) == 2 * SIZE
    assert refusal is not None
    assert "16 of 24 trials were started" in refusal


def test_checkpoints_are_kept_until_nobody_goes_on_from_them(tmp_path: Path) -> None:
    trials, _ = play(tmp_path, by_number, 3 * SIZE)
    find = unneeded(SIZE)
    assert find(trials[:SIZE]) == []
    assert find(trials[: 2 * SIZE - 1]) == []
    assert find(trials[: 2 * SIZE]) == list(range(SIZE))
    assert find(trials) == list(range(2 * SIZE))


def test_a_way_is_replayed_member_by_member(tmp_path: Path) -> None:
    members = [
        [{"label": name, "x": 10 * n + piece} for piece in range(3)] for n, name in enumerate("abc")
    ]
    replay = ReplayProposals(members=members)
    # b fails in its second piece.
    trials, refusal = play(tmp_path, lambda n, s: None if n == 4 else 0.0, 9, propose=replay)
    shown = [[(t.config["label"], t.config["x"]) for t in found] for found in generations(trials)]
    assert shown == [
        [("a", 0), ("b", 10), ("c", 20)],
        [("a", 1), ("b", 11), ("c", 21)],
        [("a", 2), ("c", 22)],
    ]
    assert [t.number for t in lineage(trials[7], trials)] == [2, 5, 7]
    assert [t.config["label"] for t in lineage(trials[7], trials)] == ["c", "c", "c"]
    assert refusal is not None, "one piece is missing, and nobody says so"
