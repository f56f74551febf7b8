"""Axes: how far along a value lies, as a share from 0 to 1, and ticks to read it by. Pixels come later."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from crab.report.texts import clean

_LARGEST = 1e100
"""Above it a value is taken for infinite: differences and squares of it would not be numbers any more."""
_SAME = 1e-9
"""Relative. Values that differ by less have no ticks between them that could be told apart."""
_TICKS = 7
"""Steps of an axis at most."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    share: float
    text: str


class Scale(Protocol):
    """An axis of numbers or of choices."""

    def share(self, value: Any) -> float | None:
        """0 at the lower end, 1 at the upper one, beyond them outside; None where the value has no place."""

    def ticks(self) -> tuple[Tick, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from low to high; low < high, and 0 < low where `log`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    """Ticks at whole numbers only."""

    def share(self, value: Any) -> float | None:
        at = number(value)
        if at is None or (self.log and at <= 0):
            return None
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(at) - low) / (high - low)
        return (at - self.low) / (self.high - self.low)

    def ticks(self) -> tuple[Tick, ...]:
        values = self._log_ticks() if self.log else self._even_ticks()
        texts = _texts(values, self.log)
        return tuple(
            Tick(share=share, text=text)
            for value, text in zip(values, texts, strict=True)
            if (share := self.share(value)) is not None and -1e-9 <= share <= 1 + 1e-9
        )

    def _even_ticks(self) -> list[float]:
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999)
        step = max(1.0, step) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        decades = math.log10(self.high) - math.log10(self.low)
        if decades < 0.7:
            return self._even_ticks()
        between = (1, 2, 5) if decades <= 2.5 else (1,)
        every = max(1, math.ceil(decades / 7))
        powers = range(
            math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1, every
        )
        return [times * 10.0**power for power in powers for times in between]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Choices at even distances, in their order."""

    names: tuple[str, ...]
    """As `word` writes them."""

    def share(self, value: Any) -> float | None:
        name = word(value)
        return self._at(self.names.index(name)) if name in self.names else None

    def ticks(self) -> tuple[Tick, ...]:
        return tuple(Tick(share=self._at(i), text=name) for i, name in enumerate(self.names))

    def _at(self, index: int) -> float:
        return index / (len(self.names) - 1) if len(self.names) > 1 else 0.5


def range_over(values: Iterable[float], log: bool = False, whole: bool = False) -> Range:
    """An axis on which all these values have a place; widened where they are all the same.

    A log axis becomes a plain one where a value is not positive.
    """
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    log = log and low > 0
    if high - low <= _SAME * max(abs(low), abs(high), _SAME):
        wide = 1.0 if whole else max(0.1 * abs(low), _SAME) if low else 1.0
        low, high = (low / 1.5, high * 1.5) if log else (low - wide, high + wide)
    return Range(low=low, high=high, log=log, whole=whole)


def limits(values: Sequence[float], lower_is_better: bool) -> tuple[float, float] | None:
    """(best, worst) of an axis that can be read: one diverged trial must not press all others into a line.

    Where the worst is more than four times as far from the best as nine tenths are, the axis ends at those.
    """
    if not values:
        return None
    ordered = sorted(values, reverse=not lower_is_better)
    best, worst, tenth = ordered[0], ordered[-1], ordered[int(0.9 * (len(ordered) - 1))]
    far = abs(worst - best) > 4 * abs(tenth - best) > 0
    return best, tenth if far else worst


def number(value: Any) -> float | None:
    """A finite number, else None: a sweep with diverged trials holds NaN, Infinity and null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _LARGEST else None


def short(value: float) -> str:
    """Four digits, which values beside each other share: 1.400 and 1.523."""
    return f"{value:#.4g}" if 1e-3 <= abs(value) < 1000 else f"{value:.4g}"


def word(value: Any) -> str:
    """A setting as a reader writes it: a number short, a text bare, all else as JSON."""
    if isinstance(value, str):
        return clean(value)
    found = number(value)
    if found is not None:
        return f"{value}" if isinstance(value, int) else f"{found:.4g}"
    return clean(json.dumps(value, default=str, sort_keys=True, ensure_ascii=False))


def _texts(values: Sequence[float], log: bool) -> list[str]:
    """Labels of ticks; those of an even axis have as many decimals as its step needs."""
    largest = max((abs(value) for value in values), default=0.0)
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    if log or largest >= 1e6 or not 1e-4 <= step:
        return [f"{value:.4g}" for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value + 0.0:.{decimals}f}" for value in values]
