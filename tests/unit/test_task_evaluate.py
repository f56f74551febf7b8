"""Scores over mixed samples, and the strongest constant answer. Tasks with masks: test_tasks.py."""

from collections import Counter
from collections.abc import Iterator, Mapping

import pytest
from support.answers import said

from crab.evaluate import (
    FEW,
    Baseline,
    best_possible,
    constant_baseline,
    few_samples,
    of_the_way,
    render_table,
    score,
)
from crab.samples import Sample
from crab.synth import make_scene, samples_of
from crab.tasks import TASKS, Answer
from crab.tasks.ave import format_answer

TEXT_TASKS = ("ave", "avvp", "arig", "avqa", "avcap")
SAMPLES = [
    sample
    for index in range(60)
    for sample in samples_of(make_scene(3, index))
    if sample.task in TEXT_TASKS
]
TRAIN = [sample for sample in SAMPLES if sample.split == "train"]
TEST = [sample for sample in SAMPLES if sample.split == "test"]


def of(task: str, samples: list[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.task == task]


def right(samples: list[Sample]) -> dict[str, Answer]:
    return {sample.id: Answer(text=sample.answer) for sample in samples}


def baseline_of(task: str, train: list[Sample], test: list[Sample]) -> Baseline:
    found = constant_baseline(task, train, test)
    assert found is not None
    return found


def test_true_targets_score_perfectly_in_the_order_of_the_tasks() -> None:
    scores = score(SAMPLES, {s.id: Answer(text=TASKS[s.task].target(s)) for s in SAMPLES})
    assert list(scores) == [task for task in TASKS if task in TEXT_TASKS]
    for task, metrics in scores.items():
        assert metrics[TASKS[task].headline] == pytest.approx(TASKS[task].perfect)
        assert metrics["parse_rate"] == 1.0
        assert metrics["missing"] == 0.0
        assert metrics["num_samples"] == len(of(task, SAMPLES))


def test_samples_without_an_answer_count_as_wrong() -> None:
    questions = of("avqa", TEST)
    half = len(questions) // 2
    scores = score(questions, right(questions[:half]))
    assert scores["avqa"]["accuracy"] == half / len(questions)
    assert scores["avqa"]["missing"] == len(questions) - half


class Lazy(Mapping[str, Answer]):
    """Answers that are made when they are asked for, and how often each was."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts
        self.loads: Counter[str] = Counter()

    def __getitem__(self, key: str) -> Answer:
        self.loads[key] += 1
        return Answer(text=self.texts[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


def test_an_answer_is_loaded_once() -> None:
    answers = Lazy({sample.id: sample.answer for sample in TEST[1:]})
    scores = score(TEST, answers)
    assert sum(metrics["missing"] for metrics in scores.values()) == 1
    assert answers.loads == Counter(sample.id for sample in TEST)


def test_answers_to_other_samples_and_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 answers.*nobody"):
        score(TEST, {"nobody": Answer(text="x")} | right(TEST))
    with pytest.raises(ValueError, match="did you mean 'avqa'"):
        score([TEST[0].model_copy(update={"task": "avqaa"})], {})


@pytest.mark.parametrize("task", TEXT_TASKS)
def test_no_train_answer_beats_the_constant_baseline_as_a_constant(task: str) -> None:
    answer, metrics = baseline_of(task, SAMPLES, TEST)
    judge, test = TASKS[task], of(task, TEST)
    assert judge.score(test, [answer] * len(test)) == metrics
    assert metrics["parse_rate"] == 1.0
    for other in of(task, SAMPLES):
        theirs = judge.score(test, said([other.answer] * len(test)))[judge.headline]
        assert theirs <= metrics[judge.headline]
    nothing = judge.score(test, said([""] * len(test)))
    assert metrics[judge.headline] > nothing[judge.headline]


def ave(number: int, start: int, end: int) -> Sample:
    return of("ave", SAMPLES)[0].model_copy(
        update={
            "id": str(number),
            "answer": format_answer("x", start, end),
            "label": {"event": "x", "start_s": start, "end_s": end},
        }
    )


def test_the_constant_may_be_one_that_no_train_sample_has() -> None:
    answer, metrics = baseline_of("ave", [ave(0, 0, 3), ave(1, 5, 10)], [ave(2, 2, 6)])
    assert metrics["accuracy"] == 1.0
    assert "2,6" in answer.text


def test_without_train_samples_there_is_a_constant_only_where_the_task_builds_one() -> None:
    assert constant_baseline("ave", of("avqa", TRAIN), TEST) is None
    answer, metrics = baseline_of("avvp", [], TEST)
    assert "none" in answer.text
    assert metrics["parse_rate"] == 1.0
    with pytest.raises(ValueError, match="no test samples of 'ave'"):
        constant_baseline("ave", TRAIN, [])


def test_the_way_is_from_the_constant_to_the_best_possible_score() -> None:
    task = TASKS["avcap"]
    assert of_the_way(task, {"cider": 6.0}, {"cider": 2.0}) == 0.5
    assert of_the_way(task, {"cider": 10.0}, {"cider": 2.0}) == 1.0
    assert of_the_way(task, {"cider": 1.0}, {"cider": 2.0}) == -0.125
    assert of_the_way(task, {"cider": 1.0}, None) is None
    assert of_the_way(task, {"cider": 10.0}, {"cider": 10.0}) is None
    # A set that has half of the classes: nobody reaches more than a half.
    limited = {"miou": 0.3, "miou_attainable": 0.5}
    assert best_possible(TASKS["avss"], limited) == 0.5
    assert of_the_way(TASKS["avss"], limited, {"miou": 0.1}) == pytest.approx(0.5)


def row_of(table: str, task: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith(f"│ {task} ")]
    return [cell.strip() for cell in row.strip("│┃ ").split("│")]


def test_the_table_shows_score_constant_perfect_and_the_way_between() -> None:
    scores = {"avcap": {"cider": 6.0, "parse_rate": 0.9, "missing": 1.0, "num_samples": 200.0}}
    table = render_table(scores, {"avcap": (Answer(text="A dog."), {"cider": 2.0})})
    assert row_of(table, "avcap") == [
        "avcap",
        "cider",
        "6.000",
        "2.000",
        "10.000",
        "50%",
        "0.900",
        "200",
    ]
    assert "warning" not in table


def test_the_table_copes_with_a_task_without_a_baseline() -> None:
    scores = score(of("ave", TEST), right(of("ave", TEST)))
    for baselines in ({}, {"ave": None}):
        table = render_table(scores, baselines)
        assert row_of(table, "ave")[2:6] == ["1.000", "-", "1.000", "-"]


def test_few_samples_are_warned_of() -> None:
    scores = {
        "ave": {"accuracy": 1.0, "parse_rate": 1.0, "num_samples": FEW - 1.0},
        "avqa": {"accuracy": 1.0, "parse_rate": 1.0, "num_samples": float(FEW)},
    }
    (line,) = few_samples(scores)
    assert "ave" in line
    assert "29" in line
    assert line in render_table(scores, {})
