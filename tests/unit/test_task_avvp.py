"""AVVP: grammar, and the official scores against an obvious second implementation on 0/1 matrices."""

import numpy as np
import pytest
from numpy.typing import NDArray
from support.answers import said

from crab.samples import Sample
from crab.tasks import TASKS
from crab.tasks.avvp import format_answer, video_scores

AVVP = TASKS["avvp"]
Events = list[tuple[str, int, int]]
NOTHING: Events = []


def sample(visual: Events, audio: Events) -> Sample:
    return Sample(
        id="s",
        task="avvp",
        split="test",
        clip="c",
        video="v.mp4",
        instruction="List them.",
        answer=format_answer(visual, audio),
        label={"visual": [list(e) for e in visual], "audio": [list(e) for e in audio]},
    )


def score(truth: tuple[Events, Events], prediction: tuple[Events, Events]) -> dict[str, float]:
    return AVVP.score([sample(*truth)], said([format_answer(*prediction)]))


def test_the_answer_is_written_in_the_grammar_and_in_order_of_time() -> None:
    answer = format_answer(
        [("blue square", 2, 10), ("red circle", 5, 8), ("red circle", 0, 3)], NOTHING
    )
    assert (
        answer
        == "<visual_event> red circle,(0 3)(5 8) ; blue square,(2 10) </visual_event> <audio_event> none </audio_event>"
    )


def test_the_true_target_scores_one_everywhere() -> None:
    truth = ([("a", 0, 3), ("a", 5, 8), ("b, c", 2, 10)], [("b, c", 1, 2)])
    assert set(score(truth, truth).values()) == {1.0}
    assert set(score((NOTHING, NOTHING), (NOTHING, NOTHING)).values()) == {1.0}


def test_spans_are_half_open() -> None:
    # Seconds 6 and 7 against 6, 7 and 8: F = 2*2 / (2*2 + 1); inclusive ends would give 6/7.
    metrics = score(([("a", 6, 8)], NOTHING), ([("a", 6, 9)], NOTHING))
    assert metrics["segment_visual_f"] == pytest.approx(0.8)
    assert score(([("a", 0, 5)], NOTHING), ([("a", 5, 10)], NOTHING))["segment_visual_f"] == 0.0


def test_an_event_matches_at_half_overlap_and_not_below() -> None:
    truth = ([("a", 0, 4)], NOTHING)
    assert score(truth, ([("a", 0, 2)], NOTHING))["event_visual_f"] == 1.0
    assert score(truth, ([("a", 0, 9)], NOTHING))["event_visual_f"] == 0.0


def test_spans_that_touch_are_one_event() -> None:
    truth = ([("a", 0, 8)], NOTHING)
    assert score(truth, ([("a", 0, 4), ("a", 4, 8)], NOTHING))["event_visual_f"] == 1.0


def test_events_of_one_class_that_overlap_are_united_and_others_are_not() -> None:
    whole: tuple[Events, Events] = ([("a", 0, 8), ("b", 2, 5)], NOTHING)
    twice = ([("a", 0, 6), ("b", 2, 5), ("a", 4, 8), ("a", 1, 3)], NOTHING)
    assert set(score(whole, twice).values()) == {1.0}
    assert set(score(twice, whole).values()) == {1.0}
    # Not rewritten by `format_answer`: a model may well say it so.
    text = "<visual_event> a,(0 6)(4 8) ; b,(2 5) ; a,(1 3) </visual_event> <audio_event> none </audio_event>"
    assert AVVP.parse(text) == AVVP.parse(format_answer(*whole))


def test_an_absent_stream_counts_one_only_if_nothing_is_predicted() -> None:
    truth = ([("a", 0, 4)], NOTHING)
    assert score(truth, ([("a", 0, 4)], NOTHING))["segment_audio_f"] == 1.0
    assert score(truth, ([("a", 0, 4)], [("b", 0, 1)]))["segment_audio_f"] == 0.0


def test_classes_of_label_and_prediction_share_the_mean() -> None:
    metrics = score(([("a", 0, 4), ("b", 0, 4)], NOTHING), ([("a", 0, 4), ("c", 0, 4)], NOTHING))
    assert metrics["segment_visual_f"] == pytest.approx(1 / 3)


def test_type_is_a_mean_of_three_and_event_pools_counts() -> None:
    truth: tuple[Events, Events] = ([("a", 0, 4)], [("a", 2, 6)])
    metrics = score(truth, ([("a", 0, 4)], NOTHING))
    assert (metrics["segment_visual_f"], metrics["segment_audio_f"], metrics["segment_av_f"]) == (
        1.0,
        0.0,
        0.0,
    )
    assert metrics["segment_type_f"] == pytest.approx(1 / 3)
    assert metrics["segment_event_f"] == pytest.approx(2 * 4 / (2 * 4 + 4))
    assert metrics["event_event_f"] == pytest.approx(2 / 3)


def test_videos_are_averaged_and_unreadable_answers_are_empty() -> None:
    samples = [sample([("a", 0, 4)], [("a", 0, 4)])] * 2 + [sample(NOTHING, [("a", 0, 4)])]
    metrics = AVVP.score(samples, said([samples[0].answer, "I see a.", "none"]))
    assert metrics["parse_rate"] == pytest.approx(1 / 3)
    assert metrics["segment_audio_f"] == pytest.approx(1 / 3)
    assert metrics["segment_visual_f"] == pytest.approx((1 + 0 + 1) / 3)


def test_goodness_is_the_segment_score_of_the_clip_and_none_for_an_unreadable_answer() -> None:
    truth = sample([("a", 0, 4)], NOTHING)
    texts = [truth.answer, format_answer([("a", 0, 2)], NOTHING), format_answer([], []), "I see a."]
    assert [AVVP.goodness(truth, answer) for answer in said(texts)] == pytest.approx(
        [1.0, (4 / 6 + 2) / 3, 2 / 3, 0.0]
    )


def test_a_label_without_times_is_named() -> None:
    weak = sample(NOTHING, NOTHING).model_copy(update={"label": {"weak": ["a"]}})
    with pytest.raises(ValueError, match=r"sample 's'.*weak"):
        AVVP.score([weak], said([""]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<visual_event> none </visual_event>",
        "<audio_event> none </audio_event> <visual_event> none </visual_event>",
        "<visual_event> </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(3 3) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(4 3) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(0 11) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(0,3) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(0 3) b,(0 3) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(0 3) ; </visual_event> <audio_event> none </audio_event>",
        "<visual_event> a,(0 3) ; none </visual_event> <audio_event> none </audio_event>",
        "<visual_event> ,(0 3) </visual_event> <audio_event> none </audio_event>",
        "<visual_event> none </visual_event> <audio_event> none </audio_event> more",
        "<visual> none </visual> <audio> none </audio>",
        "<visual_event> none </visual_event> <audio_event> none </audio_event> " * 2,
    ],
)
def test_only_the_exact_grammar_is_read(text: str) -> None:
    assert AVVP.parse(text) is None


def test_blanks_and_case_do_not_matter() -> None:
    text = "Prose.\n<visual_event>A , ( 0 3 ) (5 6);b,(0 1)</visual_event><audio_event>None</audio_event>\n"
    assert AVVP.parse(text) == AVVP.parse(
        format_answer([("a", 0, 3), ("a", 5, 6), ("b", 0, 1)], NOTHING)
    )


def test_a_long_unfinished_answer_is_refused_quickly() -> None:
    # The reader must not try every way to split a run of blanks, commas or spans.
    for part in (" ", "a, ", "a,(0 3)", "(0 3) ", ", "):
        assert AVVP.parse("<visual_event> a" + part * 2000) is None


def test_scores_equal_the_definition_on_matrices() -> None:
    dice = np.random.default_rng(5)
    for _ in range(150):
        density = dice.choice([0.05, 0.3, 0.7])
        prediction, truth = (
            [(dice.random((4, 10)) < density) & (dice.random((4, 1)) < 0.6) for _ in "av"]
            for _ in "pt"
        )
        want = by_definition(prediction, truth)
        answers = [
            AVVP.parse(format_answer(spans_of(visual), spans_of(audio)))
            for audio, visual in (prediction, truth)
        ]
        got = video_scores(answers[0], answers[1])  # type: ignore[arg-type]  # both are readable
        assert got == pytest.approx(want)


Matrix = NDArray[np.bool_]


def spans_of(matrix: Matrix) -> Events:
    return [(f"class {row}", s, s + 1) for row, s in zip(*np.nonzero(matrix), strict=True)]


def by_definition(prediction: list[Matrix], truth: list[Matrix]) -> dict[str, float]:
    """Section 5 of the notes on Crab, word for word, on [class, second] matrices in the order audio, visual."""
    scores: dict[str, float] = {}
    both = [(prediction[i], truth[i]) for i in (0, 1)] + [
        (prediction[0] & prediction[1], truth[0] & truth[1])
    ]
    for level, count in (("segment", segment_row), ("event", event_row)):
        tables = [np.array([count(p, t) for p, t in zip(*pair, strict=True)]) for pair in both]
        for stream, table in zip(("audio", "visual", "av"), tables, strict=True):
            scores[f"{level}_{stream}_f"] = f_of(table)
        scores[f"{level}_type_f"] = float(np.mean([f_of(table) for table in tables]))
        scores[f"{level}_event_f"] = f_of(tables[0] + tables[1])
    return scores


def f_of(table: NDArray[np.int64]) -> float:
    rows = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in table if tp + fp + fn]
    return float(np.mean(rows)) if rows else 1.0


def segment_row(p: Matrix, t: Matrix) -> list[int]:
    return [int((p & t).sum()), int((p & ~t).sum()), int((~p & t).sum())]


def event_row(p: Matrix, t: Matrix) -> list[int]:
    def events(row: Matrix) -> list[set[int]]:
        found: list[set[int]] = []
        for second in np.flatnonzero(row).tolist():
            if found and second - 1 in found[-1]:
                found[-1].add(second)
            else:
                found.append({second})
        return found

    def hit(event: set[int], others: list[set[int]]) -> bool:
        return any(len(event & other) / len(event | other) >= 0.5 for other in others)

    ps, ts = events(p), events(t)
    tp = sum(hit(event, ts) for event in ps)
    return [tp, len(ps) - tp, sum(not hit(event, ps) for event in ts)]
