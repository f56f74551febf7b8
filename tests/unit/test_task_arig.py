"""ARIG: strict boxes, both meanings of cIoU and the AUC against the official formulas on pixel maps."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from support.answers import said

from crab.evaluate import constant_baseline
from crab.samples import Sample
from crab.tasks import TASKS
from crab.tasks.arig import Arig, ArigBox, Box, format_answer, iou, success_auc

ARIG = Arig()


def sample(box: Box, event: str = "bell", number: int = 0) -> Sample:
    return Sample(
        id=f"s{number}",
        task="arig",
        split="test",
        clip="c",
        image="i.jpg",
        instruction="Box it.",
        answer=format_answer(event, box),
        label={"event": event, "box": list(box), "second": None},
    )


def test_both_meanings_of_ciou_and_the_name() -> None:
    # IoU 1, 1/2, 1/3 and nothing.
    truths: list[Box] = [(0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 20, 10), (0, 0, 10, 10)]
    given: list[Box] = [(0, 0, 10, 10), (0, 0, 10, 5), (10, 0, 30, 10), (100, 100, 110, 110)]
    samples = [sample(box, number=number) for number, box in enumerate(truths)]
    events = ["bell", "dog", "bell", "Bell"]
    metrics = ARIG.score(samples, said(map(format_answer, events, given)))
    assert metrics == {
        "ciou_mean": pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4),
        "ciou_at_50": 0.5,  # IoU = 0.5 is reached
        # Each falls from 1 to 0 behind the last threshold that it reaches: 1, 0.5, 0.3 and 0.
        "auc": pytest.approx((1 + 0.525 + 0.325 + 0.025) / 4),
        "event_accuracy": 0.75,
        "parse_rate": 1.0,
    }


def test_an_unreadable_answer_stays_in_every_mean() -> None:
    samples = [sample((0, 0, 10, 10), number=number) for number in range(4)]
    metrics = ARIG.score(samples, said(["", "It rings.", samples[0].answer, "<obj>(0,0)</obj>"]))
    assert metrics == {
        "ciou_mean": 0.25,
        "ciou_at_50": 0.25,
        "auc": pytest.approx((1 + 3 * 0.025) / 4),
        "event_accuracy": 0.25,
        "parse_rate": 0.25,
    }


def test_edges_are_half_open() -> None:
    # With x2 as the last column, a box ten columns wide would have eleven, and this would be 11 * 11 / (12 * 11).
    assert iou((0, 0, 10, 10), (0, 0, 11, 10)) == 100 / 110
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert iou((0, 0, 224, 224), (0, 0, 1, 1)) == 1 / 224**2


def test_disjoint_boxes_score_nothing_however_far_they_are() -> None:
    # Complete-IoU, which Crab's release has as `ciou`, would tell the two apart and be negative.
    assert iou((0, 0, 4, 4), (8, 8, 12, 12)) == iou((0, 0, 4, 4), (200, 200, 204, 204)) == 0.0


def test_scores_equal_the_official_ones_on_pixel_maps() -> None:
    dice = np.random.default_rng(3)
    boxes = [random_box(dice) for _ in range(400)]
    pairs = list(zip(boxes[::2], boxes[1::2], strict=True))
    # Overlaps of 15 of 100 and so on: the thresholds of the official code are floats, and 0.05 * 3 > 0.15.
    pairs += [((0, 0, 10, 10), (0, 0, n, 1)) for n in range(1, 11)]
    pairs += [((0, 0, 100, 1), (0, 0, n, 1)) for n in (5, 15, 30, 35, 50, 60, 70, 100)]
    want = [official_ciou(pixels(given), pixels(true)) for true, given in pairs]
    samples = [sample(true, number=number) for number, (true, _) in enumerate(pairs)]
    metrics = ARIG.score(samples, said(format_answer("bell", given) for _, given in pairs))
    assert metrics["ciou_mean"] == pytest.approx(np.mean(want))
    assert metrics["ciou_at_50"] == np.mean(np.array(want) >= 0.5)
    assert metrics["auc"] == pytest.approx(official_auc(want), abs=1e-12)


def test_the_success_curve_at_its_ends() -> None:
    assert success_auc([1.0]) == pytest.approx(1.0)
    assert success_auc([0.0]) == pytest.approx(0.025)  # t = 0 is passed by all
    assert success_auc([0.15]) == official_auc([0.15])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(0,0)(10,10)",
        "<obj>(0,0)(10,10)",
        "<obj>(0,0)</obj>",
        "<obj>0,0,10,10</obj>",
        "<obj>(0,0)(0,10)</obj>",
        "<obj>(0,0)(10,0)</obj>",
        "<obj>(10,10)(0,0)</obj>",
        "<obj>(0,0)(225,10)</obj>",
        "<obj>(0,0)(10,999)</obj>",
        "<obj>(-1,0)(10,10)</obj>",
        "<obj>(0.5,0)(10,10)</obj>",
        "<obj>(0,0)(10,10)</obj> more",
        "<obj>(0,0)(10,10)</obj><obj>(0,0)(10,10)</obj>",
        "<event> bell </event> <obj>(0,0)(10,10)</obj>",
    ],
)
def test_only_a_box_inside_the_picture_is_read(text: str) -> None:
    assert ARIG.parse(text) is None


def test_blanks_do_not_matter_and_the_name_is_the_last_one_given() -> None:
    text = "The sounding object is dog.\nNo: the Sounding object is  Red  Circle .<obj> ( 0 , 1 ) (224, 224)</obj>\n"
    assert ARIG.parse(text) == ArigBox(box=(0, 1, 224, 224), event="red circle")
    assert ARIG.parse("<obj>(0,1)(5,6)</obj>") == ArigBox(box=(0, 1, 5, 6), event=None)


def test_goodness_is_the_iou() -> None:
    truth = sample((0, 0, 10, 10))
    texts = [truth.answer, format_answer("dog", (0, 0, 10, 5)), "no idea"]
    assert [ARIG.goodness(truth, answer) for answer in said(texts)] == [1.0, 0.5, 0.0]


def test_the_constant_may_lie_between_the_train_boxes() -> None:
    train = [
        sample((0, 0, 40, 40), "dog", 0),
        sample((20, 20, 60, 60), "cat", 1),
        sample((40, 40, 80, 80), "cat", 2),
    ]
    test = [sample((20, 20, 60, 60), "cat", 3)]
    found = constant_baseline("arig", train, test)
    assert found is not None
    assert found[0].text == format_answer("cat", (20, 20, 60, 60))
    found = constant_baseline("arig", train, [sample((0, 0, 80, 80), number=4)])
    assert found is not None
    assert found[1]["ciou_mean"] == 1.0  # the hull, which no train sample has
    found = constant_baseline("arig", train, [sample((0, 0, 224, 224), number=5)])
    assert found is not None
    assert found[1]["ciou_mean"] == 1.0
    assert constant_baseline("arig", [], test) is None


def test_there_are_not_as_many_constants_as_train_boxes() -> None:
    dice = np.random.default_rng(4)
    train = [sample(random_box(dice), number=number) for number in range(2000)]
    constants = ARIG.constants(train)
    assert 200 < len(constants) < 400
    assert all(ARIG.parse(answer.text) for answer in constants)


def test_a_loose_clip_is_asked_at_a_second_and_a_picture_is_not() -> None:
    assert "at second 3" in ARIG.instruction("3")
    assert "second" not in ARIG.instruction(None)
    with pytest.raises(ValueError, match="'the dog' is no whole number"):
        ARIG.instruction("the dog")


@pytest.mark.parametrize(
    "label",
    [
        {},
        {"event": "bell"},
        {"event": None, "box": [0, 0, 1, 1]},
        {"event": "bell", "box": [0, 0, 1]},
        {"event": "bell", "box": [0, 0, 0, 1]},
        {"event": "bell", "box": [0, 0, 1, 225]},
        {"event": "bell", "box": "none"},
    ],
)
def test_a_label_that_is_no_box_is_named(label: dict[str, object]) -> None:
    broken = sample((0, 0, 1, 1)).model_copy(update={"label": label})
    with pytest.raises(ValueError, match="'s0'"):
        TASKS["arig"].score([broken], said([""]))


def random_box(dice: np.random.Generator) -> Box:
    (x1, x2), (y1, y2) = (sorted(dice.choice(225, 2, replace=False).tolist()) for _ in "xy")
    return x1, y1, x2, y2


def pixels(box: Box) -> NDArray[np.float64]:
    x1, y1, x2, y2 = box
    map_HW = np.zeros((224, 224))
    map_HW[y1:y2, x1:x2] = 1
    return map_HW


def official_ciou(given: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """The consensus IoU of SSLalignment: true pixels found, over true pixels and those found in vain."""
    return float((given * true).sum() / (true.sum() + (given * (true == 0)).sum()))


def official_auc(cious: list[float]) -> float:
    """Trapezoids over 21 thresholds, with thresholds made as in SSLalignment: 0.05 times a whole number."""
    shares = [sum(ciou >= 0.05 * step for ciou in cious) / len(cious) for step in range(21)]
    return sum(0.05 * (one + other) / 2 for one, other in itertools.pairwise(shares))
