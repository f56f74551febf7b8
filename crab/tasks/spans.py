"""Whole-second spans of a ten-second clip, kept as ten bits.

Bit `i` of a grid is second `[i, i + 1)`. A span `(start, end)` is half-open: (6, 8) is two seconds, 6 and 7. Taking
`end` as a part of the span is the commonest bug in published scorers of these tasks (`ave_eval.py` of MokA), so spans
become bits here and nowhere else. Integers, because overlaps are then `&` and counts are `bit_count()`: scoring every
train answer as a constant baseline stays in seconds without arrays.
"""

from collections.abc import Iterable

NUM_SECONDS = 10
"AVE and LLP clips, and those of AV-Shapes, are ten seconds long and labelled by whole seconds."

FULL = (1 << NUM_SECONDS) - 1

Span = tuple[int, int]


def grid(spans: Iterable[Span]) -> int:
    """Bits of the seconds that any of the half-open spans covers.

    An empty span (start = end; AVE has one such line) covers nothing. ValueError outside 0 <= start <= end <= 10.
    """
    bits = 0
    for start, end in spans:
        if not 0 <= start <= end <= NUM_SECONDS:
            raise ValueError(
                f"span ({start}, {end}) given, expected whole seconds 0 <= start <= end <= {NUM_SECONDS}"
            )
        bits |= (1 << end) - (1 << start)
    return bits


def runs(bits: int) -> tuple[Span, ...]:
    """The longest unbroken half-open spans of a grid, in time order. Inverse of `grid` for separate spans."""
    found: list[Span] = []
    start: int | None = None
    for second in range(NUM_SECONDS + 1):
        on = bool(bits >> second & 1)
        if on and start is None:
            start = second
        elif not on and start is not None:
            found.append((start, second))
            start = None
    return tuple(found)
