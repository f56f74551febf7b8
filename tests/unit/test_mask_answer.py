"""The answer of the mask tasks: grammar, spans, and which masks count for which frame."""

import itertools

import mask_samples
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab.tasks import Answer, Masks
from crab.tasks.mask_answer import (
    GROUP,
    NOTHING,
    MaskItem,
    counted_masks,
    format_mask_answer,
    frames_of,
    parse_mask_answer,
)

ONE = f"<range> 2,7 </range> red circle {GROUP}"


def item(start_s: int, end_s: int, *names: str) -> MaskItem:
    return MaskItem(start_s=start_s, end_s=end_s, names=names or ("bell",))


def test_the_text_of_the_grammar() -> None:
    assert GROUP == "<mask_start><mask_0><mask_1><mask_2><mask_3><mask_4><mask_5><mask_end>"
    items = [item(0, 3, "red circle", "blue square"), item(3, 10, "dog")]
    assert format_mask_answer(items) == (
        f"<range> 0,3 </range> red circle, blue square {GROUP} ; <range> 3,10 </range> dog {GROUP}"
    )
    assert format_mask_answer([]) == NOTHING == "<range> none </range>"


spans = st.lists(st.integers(0, 10), min_size=2, max_size=8, unique=True).map(sorted)
names = st.lists(st.sampled_from(["red circle", "dog", "violin (fiddle)", "räum"]), min_size=1)


@given(spans, st.data())
def test_what_was_formatted_is_read_back(edges: list[int], data: st.DataObject) -> None:
    items = tuple(item(start, end, *data.draw(names)) for start, end in itertools.pairwise(edges))
    assert parse_mask_answer(format_mask_answer(items)) == items
    assert parse_mask_answer(f"Reasoning: 1,2; bells.\n{format_mask_answer(items)}\n") == items


def test_nothing_is_not_the_same_as_unreadable() -> None:
    assert parse_mask_answer(NOTHING) == ()
    assert parse_mask_answer("No such object. <range>None</range>") == ()
    assert parse_mask_answer("") is None


def test_blanks_and_case_do_not_matter() -> None:
    wide = f"<range>2 , 7</range>Red  Circle{GROUP.replace('><', '> <')} \n"
    assert parse_mask_answer(wide) == parse_mask_answer(ONE) == (item(2, 7, "red circle"),)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "<range> 2,7 </range> red circle",
        f"<range> 2,7 </range> {GROUP}",
        f"red circle {GROUP}",
        f"<range> 2,2 </range> a {GROUP}",
        f"<range> 7,2 </range> a {GROUP}",
        f"<range> 2,11 </range> a {GROUP}",
        f"<range> -1,2 </range> a {GROUP}",
        f"<range> 2.5,4 </range> a {GROUP}",
        f"<range> 2,7 </range> a, {GROUP}",
        f"<range> 2,7 </range> a {GROUP.replace('<mask_3>', '')}",
        f"<range> 2,7 </range> a {GROUP.replace('<mask_3><mask_4>', '<mask_4><mask_3>')}",
        f"<range> 2,7 </range> a {GROUP.removesuffix('<mask_end>')}",
        f"{ONE} and more",
        f"{ONE} {ONE}",
        f"{ONE} ; ",
        f"{ONE} ; {NOTHING}",
        f"{NOTHING} {ONE}",
        f"{ONE} ; <range> 8,9 </range> b",
        f"<range> 5,7 </range> a {GROUP} ; <range> 2,4 </range> b {GROUP}",
        f"<range> 2,7 </range> a {GROUP} ; <range> 6,9 </range> b {GROUP}",
        f"<event> x </event> {ONE}",
    ],
)
def test_only_the_exact_grammar_is_read(text: str) -> None:
    assert parse_mask_answer(text) is None


@pytest.mark.parametrize(
    "items",
    [
        [item(3, 3)],
        [item(0, 11)],
        [item(0, 5), item(4, 8)],
        [item(5, 8), item(0, 2)],
        [MaskItem(start_s=0, end_s=2, names=())],
        [item(0, 2, "a, b")],
        [item(0, 2, "a <b>")],
        [item(0, 2, " ")],
    ],
)
def test_items_that_could_not_be_read_back_are_refused(items: list[MaskItem]) -> None:
    with pytest.raises(ValueError, match="mask items"):
        format_mask_answer(items)


def test_a_span_does_not_hold_its_end_and_frames_in_none_are_empty() -> None:
    items = [item(1, 3), item(3, 4), item(6, 9)]
    assert frames_of(items, 7) == [None, 0, 0, 1, None, None, 2]
    assert frames_of(items, 5) == [None, 0, 0, 1, None]
    assert frames_of([], 2) == [None, None]


def ramp(count: int) -> np.ndarray:
    """Frame i is i + 1 everywhere."""
    return np.ones((count, 224, 224)) * np.arange(1, count + 1)[:, None, None]


def values(answer: Answer, frames: list[int]) -> list[float | None]:
    return [None if m is None else float(m[0, 0]) for m in counted_masks(answer, frames)]


def test_a_mask_counts_where_the_text_has_a_span_over_its_frame() -> None:
    drawn = Masks(frames=(0, 1, 2, 3, 5), values=ramp(5))
    answer = Answer(text=mask_samples.text(1, 6), masks=drawn)
    assert values(answer, [0, 1, 2, 3, 4, 5, 6]) == [None, 2, 3, 4, None, 5, None]
    assert values(answer, [5, 2]) == [5, 3]


@pytest.mark.parametrize("text", ["", "It rings.", NOTHING])
def test_no_mask_counts_without_a_readable_span(text: str) -> None:
    answer = Answer(text=text, masks=Masks(frames=(0, 1), values=ramp(2)))
    assert values(answer, [0, 1]) == [None, None]


def test_no_masks_are_empty_masks() -> None:
    assert values(Answer(text=mask_samples.text()), [0, 4]) == [None, None]


def test_a_single_mask_stands_for_every_frame_of_the_spans() -> None:
    answer = Answer(text=mask_samples.text(2, 10), masks=Masks(frames=(0,), values=ramp(1)))
    assert values(answer, [0, 2, 9, 10]) == [None, 1, 1, None]


@pytest.mark.parametrize("shape", [(2, 112, 112), (3, 224, 224), (2, 224), (0, 224, 224)])
def test_masks_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    answer = Answer(
        text=mask_samples.text(), masks=Masks(frames=(0, 1), values=np.zeros(shape, np.float16))
    )
    with pytest.raises(ValueError, match="expected 2"):
        counted_masks(answer, [0])
