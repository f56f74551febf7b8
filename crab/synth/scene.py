"""A scene: who is in a ten-second clip, where, and in which seconds each is seen and heard.

Everything that is drawn, sounded, asked or answered is read from these values, so labels are exact by construction.
Lengths are fractions of the frame's side and times are seconds, so one scene renders at any size and rate.
"""

import math
from dataclasses import dataclass

from crab.tasks.spans import NUM_SECONDS, Span, grid, runs

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"The vocabulary. Its order is the order of the classes in multi-label targets: append, never reorder."

COLUMNS = ("left", "middle", "right")
NUM_ROWS = 2


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One object. It never leaves its cell of the 3 x 2 grid, so nothing hides anything and its column is exact."""

    name: str
    "colour and shape; unique in its scene"
    column: int
    row: int
    visible: int
    "seconds in which it is seen, as bits (crab.tasks.spans)"
    sounding: int
    "seconds in which it is heard, as bits"
    radius: float
    centre_x: float
    centre_y: float
    sway_x: float
    sway_y: float
    sway_hz: float
    phase: float
    "radians, of the movement"
    gain: float
    detune: float
    "factor on the pitch of its class, close to 1"

    def __post_init__(self) -> None:
        if self.name not in CLASS_NAMES:
            raise ValueError(f"class {self.name!r} given, expected one of {', '.join(CLASS_NAMES)}")

    @property
    def colour(self) -> str:
        return self.name.split()[0]

    @property
    def shape(self) -> str:
        return self.name.split()[1]

    @property
    def position(self) -> str:
        return COLUMNS[self.column]

    @property
    def place(self) -> str:
        """ "on the left", "in the middle" or "on the right"."""
        return f"{'in' if self.position == 'middle' else 'on'} the {self.position}"

    @property
    def together(self) -> int:
        """Seconds in which it is both seen and heard, as bits."""
        return self.visible & self.sounding

    def centre(self, t_s: float) -> tuple[float, float]:
        """(x, y) at a time, as fractions of the frame, y downwards."""
        turn = 2 * math.pi * self.sway_hz * t_s + self.phase
        return self.centre_x + self.sway_x * math.sin(
            0.7 * turn
        ), self.centre_y + self.sway_y * math.sin(turn)


@dataclass(frozen=True, kw_only=True)
class Scene:
    seed: int
    index: int
    background: tuple[int, int, int]
    "grey levels at the top, in the middle and at the bottom of the picture"
    actors: tuple[Actor, ...]
    duration_s: int = NUM_SECONDS

    def __post_init__(self) -> None:
        names = [actor.name for actor in self.actors]
        cells = [(actor.column, actor.row) for actor in self.actors]
        if len(set(names)) < len(names) or len(set(cells)) < len(cells):
            raise ValueError(
                f"actors {names} in cells {cells} given; classes and cells must be unique in a scene"
            )

    @property
    def clip(self) -> str:
        return f"shapes-{self.seed}-{self.index:06d}"

    @property
    def seen(self) -> tuple[Actor, ...]:
        return tuple(actor for actor in self.actors if actor.visible)

    @property
    def heard(self) -> tuple[Actor, ...]:
        return tuple(actor for actor in self.actors if actor.sounding)

    def event(self) -> tuple[Actor, Span] | None:
        """The AVE event: the only unbroken span in which something is both seen and heard; None unless there is
        exactly one such span and it lasts two seconds or more (AVE's own minimum)."""
        spans = [(actor, span) for actor in self.actors for span in runs(actor.together)]
        if len(spans) != 1 or spans[0][1][1] - spans[0][1][0] < 2:
            return None
        return spans[0]


def on(bits: int, second: int) -> bool:
    return bool(bits >> second & 1)


def seconds(start: int, end: int) -> int:
    return grid([(start, end)])
