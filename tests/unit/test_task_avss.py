"""AVSS: class maps, the number of classes, constants."""

import itertools
from pathlib import Path

import mask_samples
import numpy as np
import pytest
from mask_samples import EMPTY, FULL, mask_sample, masks, said

from crab.samples import MaskRef, Sample
from crab.tasks import TASKS, Answer

AVSS = TASKS["avss"]
LABEL = {"num_classes": 3, "names": {"1": "bell", "2": "dog"}}
SCENE = [[0, 1, 2, 2]]


def sample(
    folder: Path, *truths: list[list[int]], number: int = 0, num_classes: object = 3
) -> Sample:
    label = LABEL | {"num_classes": num_classes}
    return mask_sample(folder, "avss", truths, number=number, label=label)


def drawn(*maps: list[list[int]]) -> Answer:
    return said(maps, np.uint8)


def test_true_maps_score_one(tmp_path: Path) -> None:
    metrics = AVSS.score([sample(tmp_path, SCENE, EMPTY)], [drawn(SCENE, EMPTY)])
    assert metrics == {
        "miou": 1.0,
        "f": 1.0,
        "miou_no_background": 1.0,
        "f_no_background": 1.0,
        "miou_attainable": 1.0,
        "parse_rate": 1.0,
    }


def test_an_unreadable_text_is_all_background_and_stays_in_the_mean(tmp_path: Path) -> None:
    samples = [sample(tmp_path, SCENE, number=n) for n in range(2)]
    unreadable = Answer(text="a bell", masks=masks([SCENE], np.uint8))
    metrics = AVSS.score(samples, [drawn(SCENE), unreadable])
    # Background: 1 and 1/4; the two classes: 1 and 0.
    assert metrics["miou"] == pytest.approx((1.25 / 2 + 0.5 + 0.5) / 3)
    assert metrics["miou_no_background"] == 0.5
    assert metrics["parse_rate"] == 0.5
    assert [AVSS.goodness(samples[0], a) for a in (drawn(SCENE), unreadable)] == [1.0, 0.0]


def test_only_the_classes_that_sound_are_in_the_truth(tmp_path: Path) -> None:
    whole = sample(tmp_path, SCENE)
    refs = (MaskRef(frame=0, file=whole.masks[0].file, values=(2,)),)
    only_dog = whole.model_copy(update={"masks": refs})
    metrics = AVSS.score([only_dog], [drawn([[0, 0, 2, 2]])])
    assert metrics["miou"] == metrics["miou_attainable"] == pytest.approx(2 / 3)


def test_goodness_is_of_the_classes_seen_or_predicted(tmp_path: Path) -> None:
    one = sample(tmp_path, SCENE, EMPTY)
    assert AVSS.goodness(one, drawn([[0, 1, 1, 2]], EMPTY)) == pytest.approx((0.5 + 1) / 2)
    assert AVSS.goodness(one, drawn(SCENE, [[0, 0, 0, 1]])) == 0.5


def test_scores_do_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pairs = [
        (
            sample(tmp_path, *draw.integers(0, 3, (2, 4, 7)).tolist(), number=number),
            drawn(*draw.integers(0, 3, (2, 4, 7)).tolist()),
        )
        for number in range(4)
    ]
    expected = AVSS.score(*zip(*pairs, strict=True))
    for order in itertools.permutations(pairs):
        assert AVSS.score(*zip(*order, strict=True)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_classes", [None, 1, 257, "71", 3.0])
def test_the_number_of_classes_must_be_declared(tmp_path: Path, num_classes: object) -> None:
    with pytest.raises(ValueError, match="'avss0': AVSS label with num_classes"):
        AVSS.score([sample(tmp_path, SCENE, num_classes=num_classes)], [drawn(SCENE)])


def test_sets_with_different_classes_are_not_mixed(tmp_path: Path) -> None:
    samples = [sample(tmp_path, SCENE), sample(tmp_path, SCENE, number=1, num_classes=71)]
    with pytest.raises(ValueError, match="'avss1' has 71 classes and samples before it 3"):
        AVSS.score(samples, [drawn(SCENE)] * 2)


def test_a_true_class_that_was_not_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"avss_0_0\.png of sample 'avss0' has class 3"):
        AVSS.score([sample(tmp_path, [[0, 3]])], [drawn(SCENE)])


def test_probabilities_are_no_class_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masks of float16 given for sample 'avss0'"):
        AVSS.score([sample(tmp_path, SCENE)], [said([SCENE])])


def test_nothing_to_judge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no avss samples"):
        AVSS.score([], [])
    with pytest.raises(ValueError, match="has a true mask"):
        AVSS.score([sample(tmp_path)], [drawn(SCENE)])


def test_constants_hold_what_is_common_in_train(tmp_path: Path) -> None:
    train = [
        sample(tmp_path, [[0, 1, 2, 0]], [[0, 1, 2, 0]], number=0),
        sample(tmp_path, [[0, 0, 2, 0]], [[0, 1, 1, 0]], number=1),
        sample(tmp_path, [[0, 0, 2, 1]], [[0, 0, 0, 0]], number=2),
    ]
    constants = AVSS.constants(train)
    shown = [
        [] if a.masks is None else a.masks.values[0, 0, [0, 56, 112, 168]].tolist()
        for a in constants
    ]
    # No masks; commonest of each pixel; commonest object where objects are common; then each class there.
    assert shown == [[], [0, 0, 2, 0], [0, 1, 2, 0], [0, 1, 1, 0], [0, 2, 2, 0]] or shown == [
        [],
        [0, 0, 2, 0],
        [0, 1, 2, 0],
        [0, 2, 2, 0],
        [0, 1, 1, 0],
    ]
    test = [sample(tmp_path, *[[[0, 1, 2, 0]]] * 10, number=9)]
    assert max(AVSS.score(test, [a])["miou"] for a in constants) == 1.0


def test_constants_without_train_maps_are_all_background(tmp_path: Path) -> None:
    for train in ([], [sample(tmp_path)], [sample(tmp_path, EMPTY)]):
        (nothing,) = AVSS.constants(train)
        assert nothing.masks is None
        assert AVSS.parse(nothing.text) == ()


def test_what_is_asked(tmp_path: Path) -> None:
    one = sample(tmp_path, FULL)
    assert AVSS.request(one) == "Mask it."
    assert AVSS.target(one) == "It rings. " + mask_samples.text()
    assert "class" in AVSS.instruction(None)
    with pytest.raises(ValueError, match="asks its own question"):
        AVSS.instruction("which?")
