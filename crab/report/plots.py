"""From shares of axes to pixels of a picture."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from crab.report.scales import Scale, Tick
from crab.report.sweep_views import Axis, Label, Plot

MOST = 16
"""Characters of a label across."""


@dataclass(frozen=True, kw_only=True)
class Area:
    """A picture and the place of its axes; `pad` pixels keep marks at the ends of an axis whole."""

    width: float
    height: float
    left: float = 64.0
    right: float = 16.0
    top: float = 16.0
    bottom: float = 48.0
    """Margins."""
    pad: float = 12.0

    @property
    def across(self) -> float:
        """Pixels from share 0 to share 1."""
        return self.width - self.left - self.right - 2 * self.pad

    @property
    def up(self) -> float:
        return self.height - self.top - self.bottom - 2 * self.pad

    def x(self, share: float) -> float:
        return round(self.left + self.pad + share * self.across, 1)

    def y(self, share: float) -> float:
        """Upwards, as axes go and pixels do not."""
        return round(self.height - self.bottom - self.pad - share * self.up, 1)

    def plot(self, x: Axis, y: Axis) -> Plot:
        return Plot(
            width=self.width,
            height=self.height,
            left=self.left,
            right=self.width - self.right,
            top=self.top,
            bottom=self.height - self.bottom,
            x=x,
            y=y,
        )

    def x_axis(self, title: str, scale: Scale) -> Axis:
        return Axis(title=title, labels=labels(scale.ticks(), self.x))

    def y_axis(self, title: str, scale: Scale) -> Axis:
        return Axis(title=title, labels=labels(scale.ticks(), self.y, gap=13.0))


def labels(
    ticks: Iterable[Tick], place: Callable[[float], float], gap: float = 0.0
) -> tuple[Label, ...]:
    """Ticks at their pixels, as far as there is room for them."""
    return spaced([Label(at=place(tick.share), text=tick.text) for tick in ticks], gap)


def spaced(found: Iterable[Label], gap: float = 0.0) -> tuple[Label, ...]:
    """Labels that do not run into the one before: upwards each takes `gap` pixels, across (0) what its text needs."""
    kept: list[Label] = []
    end = float("-inf")
    for label in sorted(found, key=lambda label: label.at):
        # A digit is some 6.5 pixels wide, and the page cuts a label to MOST characters.
        half = gap / 2 if gap else 3.4 * min(MOST, len(label.text)) + 3
        if label.at - half >= end:
            kept.append(label)
            end = label.at + half
    return tuple(kept)


def clipped(share: float) -> float:
    """Within the axis."""
    return min(1.0, max(0.0, share))
