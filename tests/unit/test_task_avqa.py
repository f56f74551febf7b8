"""AVQA: exact match, by type, nothing leaves the denominator."""

import pytest
from support.answers import said

from crab.samples import Sample
from crab.tasks import TASKS
from crab.tasks.avqa import format_answer, type_prior

AVQA = TASKS["avqa"]


def sample(answer: str, kind: list[str], number: int = 0) -> Sample:
    return Sample(
        id=f"s{number}",
        task="avqa",
        split="test",
        clip="c",
        video="v.mp4",
        instruction="Answer.",
        answer=format_answer(answer),
        label={"answer": answer, "question": "?", "type": kind},
    )


COUNT, EXIST, PLACE = (
    ["Audio", "Counting"],
    ["Audio-Visual", "Existential"],
    ["Audio-Visual", "Location"],
)


def test_accuracy_by_question_by_modality_and_by_type() -> None:
    samples = [
        sample("two", COUNT, 0),
        sample("yes", EXIST, 1),
        sample("no", EXIST, 2),
        sample("left", PLACE, 3),
    ]
    metrics = AVQA.score(samples, said(format_answer(a) for a in ("two", "yes", "yes", "right")))
    assert metrics == {
        "accuracy": 0.5,
        "audio": 1.0,
        "audio_counting": 1.0,
        "audio_visual": pytest.approx(1 / 3),
        "audio_visual_existential": 0.5,
        "audio_visual_location": 0.0,
        "parse_rate": 1.0,
    }


def test_unreadable_and_unknown_answers_are_wrong_and_stay_in_the_mean() -> None:
    samples = [sample("two", COUNT, n) for n in range(4)]
    metrics = AVQA.score(samples, said(["two", format_answer("a dozen"), format_answer("two"), ""]))
    assert metrics["accuracy"] == 0.25
    assert metrics["audio_counting"] == 0.25
    assert metrics["parse_rate"] == 0.5


def test_a_word_in_the_reasoning_is_no_answer() -> None:
    assert AVQA.parse("It is two <answer> three </answer>") == "three"
    for text in (
        "two",
        "<answer> </answer>",
        "<answer> two",
        "<answer>two</answer> or <answer>one</answer>",
    ):
        assert AVQA.parse(text) is None


def test_case_and_blanks_do_not_matter_but_words_do() -> None:
    samples = [sample("Red Circle", COUNT)]
    assert AVQA.score(samples, said(["<answer>red  circle</answer>"]))["accuracy"] == 1.0
    assert AVQA.score(samples, said(["<answer>red circles</answer>"]))["accuracy"] == 0.0


def test_the_prior_answers_by_type_with_the_commonest_train_answer() -> None:
    train = [sample(a, COUNT) for a in ("two", "two", "one")] + [
        sample(a, EXIST) for a in ("no", "no", "no", "yes")
    ]
    test = [sample("two", COUNT), sample("yes", EXIST), sample("left", PLACE)]
    assert type_prior(train, test) == said(format_answer(a) for a in ("two", "no", "no"))


def test_a_label_without_answer_is_named() -> None:
    broken = sample("two", COUNT).model_copy(update={"label": {"question": "?"}})
    with pytest.raises(ValueError, match="'s0'"):
        AVQA.score([broken], said([""]))


def test_all_nine_types_of_the_data_set_are_told_apart() -> None:
    kinds = [
        *(["Audio", kind] for kind in ("Counting", "Comparative")),
        *(["Visual", kind] for kind in ("Counting", "Location")),
        *(
            ["Audio-Visual", kind]
            for kind in ("Existential", "Counting", "Location", "Comparative", "Temporal")
        ),
    ]
    samples = [sample("yes", kind, number) for number, kind in enumerate(kinds)]
    metrics = AVQA.score(samples, said([format_answer("yes")] * 4 + [format_answer("no")] * 5))
    assert {name: metrics[name] for name in ("accuracy", "audio", "visual", "audio_visual")} == {
        "accuracy": 4 / 9,
        "audio": 1.0,
        "visual": 1.0,
        "audio_visual": 0.0,
    }
    assert len(metrics) == 9 + 3 + 1 + 1  # types, modalities, accuracy, parse_rate


def test_a_loose_clip_needs_a_question() -> None:
    assert AVQA.instruction("How many?") == "Answer this question: How many?"
    for question in (None, "", " "):
        with pytest.raises(ValueError, match="needs a question"):
            AVQA.instruction(question)
