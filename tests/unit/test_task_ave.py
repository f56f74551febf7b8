"""AVE: half-open ranges, unreadable answers, full denominators."""

import pytest
from support.answers import said

from crab.samples import Sample
from crab.tasks import TASKS
from crab.tasks.ave import format_answer

AVE = TASKS["ave"]


def sample(event: str, start_s: int, end_s: int, number: int = 0) -> Sample:
    return Sample(
        id=f"s{number}",
        task="ave",
        split="test",
        clip=f"c{number}",
        video="v.mp4",
        instruction="Name it.",
        reasoning="It rings.",
        answer=format_answer(event, start_s, end_s),
        label={"event": event, "start_s": start_s, "end_s": end_s},
    )


def test_the_true_target_scores_one() -> None:
    samples = [sample("violin, fiddle", 0, 10), sample("bell", 6, 8, 1)]
    metrics = AVE.score(samples, said(AVE.target(s) for s in samples))
    assert metrics == {
        "accuracy": 1.0,
        "event_accuracy": 1.0,
        "exact_match": 1.0,
        "parse_rate": 1.0,
    }


def test_a_range_does_not_hold_its_end() -> None:
    # With inclusive ends 6,8 would hold second 8 and this would be 10 of 10.
    assert AVE.score([sample("bell", 6, 8)], said([format_answer("bell", 6, 9)]))["accuracy"] == 0.9
    assert (
        AVE.score([sample("bell", 0, 5)], said([format_answer("bell", 5, 10)]))["accuracy"] == 0.0
    )


def test_a_wrong_event_is_wrong_in_its_seconds_and_right_outside_both() -> None:
    metrics = AVE.score([sample("bell", 2, 6)], said([format_answer("dog", 4, 8)]))
    assert metrics["accuracy"] == 0.4
    assert metrics["event_accuracy"] == 0.0


def test_an_unreadable_answer_is_background_and_stays_in_the_mean() -> None:
    samples = [sample("bell", 0, 10, 0), sample("bell", 0, 4, 1), sample("bell", 0, 10, 2)]
    texts = ["no idea", "no idea", format_answer("bell", 0, 10)]
    metrics = AVE.score(samples, said(texts))
    assert metrics["accuracy"] == pytest.approx((0 + 6 + 10) / 30)
    assert metrics["parse_rate"] == pytest.approx(1 / 3)
    assert metrics["event_accuracy"] == pytest.approx(1 / 3)


def test_an_unreadable_answer_does_not_shift_the_ones_after_it() -> None:
    samples = [sample("bell", 0, 10, 0), sample("dog", 3, 7, 1), sample("cat", 1, 5, 2)]
    texts = ["?", format_answer("dog", 3, 7), format_answer("cat", 1, 5)]
    assert AVE.score(samples, said(texts))["accuracy"] == pytest.approx(20 / 30)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<event> bell </event>",
        "<range> 0,3 </range> <event> bell </event>",
        "<event> bell </event> <range> 3,3 </range>",
        "<event> bell </event> <range> 5,3 </range>",
        "<event> bell </event> <range> 0,11 </range>",
        "<event> bell </event> <range> -1,3 </range>",
        "<event> bell </event> <range> 0.5,3 </range>",
        "<event>  </event> <range> 0,3 </range>",
        "<event> bell </event> <range> 0,3 </range> and more",
        "<event> a </event> <range> 0,3 </range> <event> b </event> <range> 0,3 </range>",
        "<event> bell </event> <range> 0,3",
    ],
)
def test_only_the_exact_grammar_is_read(text: str) -> None:
    assert AVE.parse(text) is None


def test_blanks_and_case_do_not_matter() -> None:
    assert AVE.parse("Prose.\n<event>Church  Bell</event><range> 0 , 10 </range>\n") == AVE.parse(
        format_answer("church bell", 0, 10)
    )


def test_official_labels_without_length_are_all_background() -> None:
    assert AVE.score([sample("bell", 0, 0)], said([""]))["accuracy"] == 1.0


def test_background_is_an_answer_too() -> None:
    truth, other = sample("background", 0, 10), sample("bell", 0, 4)
    answers = said([format_answer("background", 0, 10)] * 2)
    assert AVE.score([truth, other], answers)["accuracy"] == (10 + 6) / 20


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="'s0'"):
        AVE.score(
            [
                sample("bell", 0, 3).model_copy(
                    update={"label": {"event": "bell", "start_s": 0, "end_s": 30}}
                )
            ],
            said([""]),
        )
    with pytest.raises(ValueError, match="1 answers given for 2"):
        AVE.score([sample("bell", 0, 3)] * 2, said([""]))
    with pytest.raises(ValueError, match="at least one"):
        AVE.score([], [])
    with pytest.raises(ValueError, match="more than 1 answers"):
        AVE.score([sample("bell", 0, 3)], said(["", ""]))
    with pytest.raises(ValueError, match="leave out 'What'"):
        AVE.instruction("What")


def test_goodness_is_the_share_of_right_seconds_and_none_for_an_unreadable_answer() -> None:
    truth = sample("bell", 0, 4)
    texts = [format_answer("bell", 0, 4), format_answer("bell", 0, 6), "no idea"]
    assert [AVE.goodness(truth, answer) for answer in said(texts)] == [1.0, 0.8, 0.0]
