"""How a global batch is cut for ranks and micro batches."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.partition import parts_of_equal_sum, parts_of_equal_work


def work(lengths: list[int], extras: list[int], part: slice) -> int:
    return len(lengths[part]) * max(lengths[part]) + sum(extras[part])


@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 900)), min_size=1, max_size=9), st.data()
)
def test_no_cut_into_parts_has_a_smaller_largest_part(
    samples: list[tuple[int, int]], data: st.DataObject
) -> None:
    samples.sort()
    lengths, extras = [length for length, _ in samples], [extra for _, extra in samples]
    count = data.draw(st.integers(1, len(lengths)))
    parts = parts_of_equal_work(lengths, extras, count)
    assert [n for part in parts for n in lengths[part]] == lengths
    assert len(parts) == count
    assert all(lengths[part] for part in parts)
    others = (
        [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(lengths)])]
        for cuts in itertools.combinations(range(1, len(lengths)), count - 1)
    )
    least = min(max(work(lengths, extras, part) for part in cut) for cut in others)
    assert max(work(lengths, extras, part) for part in parts) == least


def test_a_few_long_samples_are_a_part_of_their_own() -> None:
    lengths = [160] * 10 + [190] * 4 + [400, 410]
    extras = [0] * 16
    parts = parts_of_equal_work(lengths, extras, 4)
    assert parts[-1] == slice(14, 16)
    assert max(work(lengths, extras, part) for part in parts) < 1.15 * sum(lengths) / 4


@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.integers(1, 3))
def test_parts_of_packed_samples_are_at_most_a_third_larger_than_they_must(
    works: list[int], count: int
) -> None:
    count = min(count, len(works))
    parts = parts_of_equal_sum(works, count)
    assert sorted(index for part in parts for index in part) == list(range(len(works)))
    assert len(parts) == count
    assert all(parts)
    least = min(
        max(sum(w for w, p in zip(works, where, strict=True) if p == part) for part in range(count))
        for where in itertools.product(range(count), repeat=len(works))
    )
    assert max(sum(works[index] for index in part) for part in parts) <= 4 / 3 * least


def test_parts_of_packed_samples_differ_little_where_tasks_differ_in_length() -> None:
    works = [260] * 10 + [290] * 4 + [500, 510]
    largest = max(sum(works[n] for n in part) for part in parts_of_equal_sum(works, 4))
    assert largest < 1.1 * sum(works) / 4


@pytest.mark.parametrize(
    "cut", [lambda: parts_of_equal_work([1, 2], [0, 0], 3), lambda: parts_of_equal_sum([1, 2], 3)]
)
def test_more_parts_than_samples_are_refused(cut: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="2 samples do not make 3 parts"):
        cut()
