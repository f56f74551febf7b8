"""Scores over mixed samples, and the strongest constant answer."""

import pytest

from crab.evaluate import constant_baseline, render_table, score
from crab.samples import Sample
from crab.synth import make_scene, samples_of
from crab.tasks import TASKS

SAMPLES = [sample for index in range(60) for sample in samples_of(make_scene(3, index))]
TRAIN = [sample for sample in SAMPLES if sample.split == "train"]
TEST = [sample for sample in SAMPLES if sample.split == "test"]


def of(task: str, samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.task == task]


def test_true_targets_score_one_in_every_task() -> None:
    scores = score(SAMPLES, {s.id: TASKS[s.task].target(s) for s in SAMPLES})
    assert scores.keys() == TASKS.keys()
    for task, metrics in scores.items():
        assert metrics[TASKS[task].headline] == 1.0
        assert metrics["parse_rate"] == 1.0
        assert metrics["num_samples"] == len(of(task, SAMPLES))


def test_samples_without_text_count_as_wrong() -> None:
    questions = of("avqa", TEST)
    scores = score(questions, {s.id: s.answer for s in questions[: len(questions) // 2]})
    assert scores["avqa"]["accuracy"] == len(questions) // 2 / len(questions)
    assert scores["avqa"]["missing"] == len(questions) - len(questions) // 2


def test_texts_of_other_samples_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="nobody"):
        score(TEST, {"nobody": "x"})
    with pytest.raises(ValueError, match="did you mean 'avqa'"):
        score([TEST[0].model_copy(update={"task": "avqaa"})], {})


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_train_answer_beats_the_constant_baseline_as_a_constant(task: str) -> None:
    answer, metrics = constant_baseline(task, SAMPLES, TEST)
    judge = TASKS[task]
    test = of(task, TEST)
    assert judge.score(test, [answer] * len(test)) == metrics
    assert metrics["parse_rate"] == 1.0
    for other in of(task, SAMPLES):
        assert (
            judge.score(test, [other.answer] * len(test))[judge.headline] <= metrics[judge.headline]
        )
    assert metrics[judge.headline] > judge.score(test, [""] * len(test))[judge.headline]


def test_the_constant_may_be_one_that_no_train_sample_has() -> None:
    def clip(number: int, start: int, end: int) -> Sample:
        base = of("ave", SAMPLES)[0]
        return base.model_copy(
            update={
                "id": str(number),
                "answer": f"<event> x </event> <range> {start},{end} </range>",
                "label": {"event": "x", "start_s": start, "end_s": end},
            }
        )

    answer, metrics = constant_baseline("ave", [clip(0, 0, 3), clip(1, 5, 10)], [clip(2, 2, 6)])
    assert metrics["accuracy"] == 1.0
    assert "2,6" in answer


def test_a_baseline_needs_both_splits() -> None:
    with pytest.raises(ValueError, match="0 train"):
        constant_baseline("ave", [], TEST)


def test_the_table_shows_score_and_baseline_side_by_side() -> None:
    scores = score(of("ave", TEST), {s.id: s.answer for s in of("ave", TEST)})
    _, baseline = constant_baseline("ave", TRAIN, TEST)
    text = render_table(scores, {"ave": ("", baseline)})
    (row,) = [line for line in text.splitlines() if " ave " in line]
    assert "1.000" in row
    assert f"{baseline['accuracy']:.3f}" in row
