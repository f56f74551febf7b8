"""How a global batch is cut for ranks and micro batches."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.recipe import parts_of_equal_work


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


def test_more_parts_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples do not make 3 parts"):
        parts_of_equal_work([1, 2], [0, 0], 3)
