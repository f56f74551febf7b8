"""The journal of a sweep: what was asked and shown, found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from crab_platform.storage import AlreadyExists, FolderStore
from crab_platform.trial_journal import Result, TrialJournal, read_trial, read_trials


def result(step: int, value: float, node: str = "n") -> Result:
    return Result(step=step, metrics={"val/loss": value}, seconds=1.5, node=node, at="now")


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    journal = TrialJournal(store, 7)
    journal.ask({"num_heads": 3, "router_temperature": 0.1 + 0.2})
    journal.start("here")
    journal.append(0, result(10, 1 / 3))
    journal.fail("it broke")
    journal.start("there")
    journal.append(1, result(20, float("nan")))
    TrialJournal(store, 9).ask({"num_heads": 1})
    journal.finish("stopped", "by asha")

    first, second = read_trials(store)
    assert first == read_trial(store, 7)
    assert (first.number, first.status, first.steps, first.seconds) == (7, "stopped", 20, 3.0)
    assert first.config == {"num_heads": 3, "router_temperature": 0.1 + 0.2}
    assert next(r.metrics["val/loss"] for r in first.results) == 1 / 3
    assert [s.node for s in first.starts] == ["here", "there"]
    assert [f.reason for f in first.failures] == ["it broke"]
    assert first.best("val/loss", "min") == 1 / 3 == first.best("val/loss", "max"), "NaN is no best"
    assert first.best("val/accuracy", "min") is None
    assert (second.number, second.status, second.steps) == (9, "unfinished", 0)


def test_the_first_word_counts(tmp_path: Path) -> None:
    journal = TrialJournal(FolderStore(tmp_path), 0)
    journal.ask({})
    with pytest.raises(AlreadyExists):
        journal.ask({})
    assert journal.append(0, result(1, 0.5)) == result(1, 0.5)
    assert journal.append(0, result(1, 0.75)) == result(1, 0.5), "another process was there before"
    journal.finish("completed", "all steps")
    journal.finish("failed", "too late")
    end = journal.end()
    assert end is not None
    assert (end.status, end.reason) == ("completed", "all steps")


def test_checkpoints_go_and_results_stay(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    journal = TrialJournal(store, 3)
    journal.ask({})
    journal.append(0, result(1, 0.5))
    state = FolderStore(journal.state_url)
    state.create("checkpoint_00000001_ab/complete.json", b"{}")
    state.create("checkpoint_00000001_ab/state.safetensors", b"x")
    assert read_trial(store, 3).steps == 1, "a checkpoint's marker is no part of the journal"
    journal.clear_state()
    assert state.list() == []
    assert read_trial(store, 3).steps == 1


def test_a_sample_that_was_not_asked_to_its_end_is_no_trial(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    TrialJournal(store, 0).start("somewhere")
    assert read_trials(store) == []
