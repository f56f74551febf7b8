"""Parts of a sweep that need no Ray: what is asked, how many fit, what it may cost, which nodes are set aside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from crab_platform.asha import JournaledAsha
from crab_platform.bad_nodes import TOO_MANY, BadNodes
from crab_platform.budget import Budget, Limits
from crab_platform.capacity import Need, NoRoom, capacity
from crab_platform.cost import Prices
from crab_platform.search import NUM_RANDOM, REFUSED_IN_A_ROW, JournaledSearch, OptunaProposals
from crab_platform.storage import FolderStore
from crab_platform.trial import AGAIN, AVOID, NUMBER
from crab_platform.trial_journal import Result, TrialJournal, TrialRecord, read_trials

SPACE = {
    "x": FloatDistribution(0, 1),
    "n": IntDistribution(1, 8),
    "kind": CategoricalDistribution(["a", "b"]),
}


def proposals(searcher: Any = "optuna", seed: int = 1, **more: Any) -> OptunaProposals:
    return OptunaProposals(
        space=SPACE, searcher=searcher, metric="loss", mode="min", seed=seed, **more
    )


def play(
    folder: Path, count: int, *, kill_after: Sequence[int] = (), seed: int = 1
) -> list[dict[str, Any]]:
    """Samples of a search whose trials show (x - 0.7)^2; a new search over the same files after each kill."""
    store = FolderStore(folder)

    def start() -> JournaledSearch:
        return JournaledSearch(
            store,
            proposals(seed=seed),
            num_samples=count,
            examine=lambda _: None,
            metric="loss",
            mode="min",
        )

    search, asked, kills = start(), {}, list(kill_after)
    while (sample := search.suggest("id")) != Searcher.FINISHED:
        number = sample.pop(NUMBER)
        del sample[AVOID]
        assert asked.setdefault(number, sample) == sample, "the same number, another sample"
        journal = TrialJournal(store, number)
        value = (sample["x"] - 0.7) ** 2
        journal.append(0, Result(step=1, metrics={"loss": value}, seconds=1, node="", at=""))
        if kills and number == kills[0]:  # killed before its end was written
            kills.pop(0)
            search = start()
            continue
        journal.finish("completed", "")
        search.on_trial_complete("id")
    return [asked[number] for number in sorted(asked)]


def test_a_search_that_was_killed_asks_what_it_would_have_asked(tmp_path: Path) -> None:
    count = NUM_RANDOM + 6
    whole = play(tmp_path / "whole", count)
    assert len(whole) == count
    assert len({sample["x"] for sample in whole}) == count, "the same sample again and again"
    # A kill inside of what is random, one at its edge, two where the model has the word.
    assert play(tmp_path / "killed", count, kill_after=(3, 9, 11, 13)) == whole
    assert play(tmp_path / "other", count, seed=2) != whole
    assert len(read_trials(FolderStore(tmp_path / "killed"))) == count


def test_the_model_learns_from_what_trials_show(tmp_path: Path) -> None:
    """After the random samples, TPE asks nearer to the best x than chance: 0.25 away on average, or more."""
    samples = play(tmp_path, 60)
    late = [abs(sample["x"] - 0.7) for sample in samples[40:]]
    assert sum(late) / len(late) < 0.15


def test_first_samples_come_first_and_may_lie_outside(tmp_path: Path) -> None:
    first = ({"x": 0.5, "n": 3, "kind": "a"}, {"x": 7.0, "n": 3, "kind": "a"})
    propose = proposals(first=first)
    assert [propose(n, []) for n in range(2)] == list(first)
    known = [
        TrialRecord(number=n, config=dict(sample), asked_at="")
        for n, sample in enumerate([*first, *(propose(2 + n, []) for n in range(NUM_RANDOM))])
    ]
    assert 0 <= propose(len(known), known)["x"] <= 1, "Optuna would refuse x = 7 for a known trial"


def test_impossible_samples_are_refused_and_do_not_count(tmp_path: Path) -> None:
    def examine(sample: Any) -> str | None:
        return None if sample["n"] >= 5 else f"n is {sample['n']}"

    search = JournaledSearch(
        FolderStore(tmp_path),
        proposals("random"),
        num_samples=8,
        examine=examine,
        metric="loss",
        mode="min",
    )
    asked = []
    while (sample := search.suggest("id")) != Searcher.FINISHED:
        asked.append(sample)
        search.on_trial_complete("id")
    assert len(asked) == 8
    assert all(sample["n"] >= 5 for sample in asked)
    refused = [trial for trial in read_trials(search._store) if trial.status == "refused"]
    assert refused
    assert all(t.end is not None and t.end.reason == f"n is {t.config['n']}" for t in refused)
    assert search.refusal is None


def test_a_space_of_impossible_samples_ends_with_their_reason(tmp_path: Path) -> None:
    search = JournaledSearch(
        FolderStore(tmp_path),
        proposals(),
        num_samples=8,
        examine=lambda _: "too large",
        metric="loss",
        mode="min",
    )
    assert search.suggest("") == Searcher.FINISHED
    assert search.refusal is not None
    assert "too large" in search.refusal
    assert len(read_trials(search._store)) == REFUSED_IN_A_ROW


def test_a_trial_that_fails_comes_again_on_other_nodes_so_often_and_no_more(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    bad: list[str] = []

    def start() -> JournaledSearch:
        return JournaledSearch(
            store,
            proposals(),
            num_samples=2,
            examine=lambda _: None,
            metric="loss",
            mode="min",
            max_failures=2,
            avoid=lambda: list(bad),
        )

    search = start()
    first = search.suggest("a")
    assert (first[NUMBER], first[AVOID]) == (0, [])
    assert search.suggest("b")[NUMBER] == 1
    assert search.suggest("c") is None, "it may yet have to be asked again"
    bad.append("node")
    TrialJournal(store, 0).fail("first")
    search.on_trial_complete("a", error=True)
    search.on_trial_complete("b")
    assert search.suggest("d") == first | {AVOID: ["node"]}

    search = start()  # the sweep was killed: the failure before counts
    assert search.suggest("e")[NUMBER] == 0
    search.on_trial_complete("e", error=True)
    assert search.suggest("f")[NUMBER] == 0
    search.on_trial_complete("f", error=True)
    assert search.suggest("g")[NUMBER] == 1, "three failures were two too many"
    search.on_trial_complete("g")
    assert search.suggest("h") == Searcher.FINISHED


def test_what_failed_for_good_is_not_tried_again_when_the_sweep_is_started_again(
    tmp_path: Path,
) -> None:
    store = FolderStore(tmp_path)

    def start() -> JournaledSearch:
        return JournaledSearch(
            store, proposals(), num_samples=2, examine=lambda _: None, metric="loss", mode="min"
        )

    assert start().suggest("a")[NUMBER] == 0
    TrialJournal(store, 0).finish("failed", "it is hopeless")
    search = start()
    assert search.suggest("b")[NUMBER] == 1
    search.on_trial_complete("b")
    assert search.suggest("c") == Searcher.FINISHED, "it counts as one of the two"


def test_a_decision_stands_when_results_are_shown_again() -> None:
    """Trial 9 went on at the first rung when it was the first there; shown again, it comes after better ones."""

    def judged(again: bool) -> str:
        asha = JournaledAsha(
            time_attr="step", metric="loss", mode="min", max_t=9, grace_period=1, reduction_factor=3
        )
        for number in range(9):
            trial: Any = SimpleNamespace(trial_id=str(number))
            asha.on_trial_add(None, trial)
            asha.on_trial_result(None, trial, {"step": 1, "loss": 0.1 * number, AGAIN: False})
        late: Any = SimpleNamespace(trial_id="late")
        asha.on_trial_add(None, late)
        return asha.on_trial_result(None, late, {"step": 1, "loss": 5.0, AGAIN: again})

    assert judged(again=True) == TrialScheduler.CONTINUE
    assert judged(again=False) == TrialScheduler.STOP


NODE = {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("need", "nodes", "wanted", "count"),
    [
        (Need(workers=1, cpus=1), [{"CPU": 2.0}], None, 2),
        (Need(workers=1, cpus=1), [{"CPU": 2.0}], 1, 1),
        (Need(workers=1, cpus=3), [NODE, NODE], None, 2),  # 8 CPUs, but no node has 6
        (Need(workers=1, cpus=1, gpus=1), [NODE, {"CPU": 16.0}], None, 2),
        (Need(workers=2, cpus=1, gpus=1), [NODE, NODE], None, 2),
        (Need(workers=1, cpus=0.5, gpus=0.25), [NODE], 100, 8),
    ],
)  # fmt: skip
def test_how_many_trials_fit(
    need: Need, nodes: list[dict[str, float]], wanted: int | None, count: int
) -> None:
    assert capacity(need, nodes, wanted).max_concurrent == count


@pytest.mark.parametrize(
    ("need", "nodes"),
    [
        (Need(workers=1, cpus=3), [{"CPU": 2.0}, {"CPU": 2.0}]),
        (Need(workers=1, cpus=1, gpus=1), [{"CPU": 64.0}]),
        (Need(workers=4, cpus=1), [{"CPU": 2.0}]),
        (Need(workers=1, cpus=1), []),
    ],
)
def test_no_room_says_what_is_needed_and_what_there_is(
    need: Need, nodes: list[dict[str, float]]
) -> None:
    with pytest.raises(NoRoom, match=r"needs .* CPUs.*the cluster has .*train\.workers\.count"):
        capacity(need, nodes, None)


PRICES = Prices(
    currency="USD", cpu_hour=0.05, gpu_hour=2, storage_gb_month=0, put_per_1000=0, get_per_1000=0,
    list_per_1000=0, egress_gb=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "unit"),
    [
        (Limits(gpu_hours=1.0), "GPU-hours"),
        (Limits(cpu_hours=4.0), "CPU-hours"),
        (Limits(money=2.2), "USD"),  # an hour of a GPU and four CPUs
    ],
)
def test_a_budget_is_spent_when_it_is_and_not_before(limits: Limits, unit: str) -> None:
    budget = Budget(need=Need(workers=2, cpus=2, gpus=0.5), limits=limits, prices=PRICES)
    budget.take(3599)
    assert budget.spent() is None
    budget.take(1)
    assert unit in str(budget.spent())


def test_a_budget_in_money_needs_prices() -> None:
    with pytest.raises(ValueError, match="prices"):
        Budget(need=Need(workers=1, cpus=1), limits=Limits(money=1))
    assert Budget(need=Need(workers=1, cpus=1)).cost(10) is None


def test_a_node_where_one_trial_after_the_other_fails_is_set_aside() -> None:
    bad = BadNodes()
    for trial in range(TOO_MANY - 1):
        assert not bad.failed("a", trial, ["a", "b"])
    assert bad.failed("a", TOO_MANY, ["a", "b"])
    assert bad.names == ["a"]
    for trial in range(2 * TOO_MANY):
        assert not bad.failed("b", trial, ["a", "b"]), "the last node is never set aside"


def test_a_node_is_not_blamed_for_one_trial_or_between_results() -> None:
    bad = BadNodes()
    assert not any(bad.failed("a", 5, ["a", "b"]) for _ in range(2 * TOO_MANY)), "the trial is bad"
    for trial in range(2 * TOO_MANY):
        assert not bad.failed("b", trial, ["a", "b"])
        bad.worked("b")
    assert bad.names == []
