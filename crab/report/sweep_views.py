"""What the page of a sweep shows, as plain values in pixels and words: the templates read these and nothing else."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Label:
    """A tick and its text, at a pixel of its axis."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    title: str
    labels: tuple[Label, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plot:
    """The frame of a figure: a picture of width x height pixels, axes between left and right, top and bottom."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A trial at a place. `key` ties it to the same trial elsewhere on the page."""

    key: int
    x: float
    y: float
    r: float
    status: str
    level: int | None
    """Of its colour; None: it has no value."""
    words: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A piece of the surface behind the trials."""

    x: float
    y: float
    width: float
    height: float
    level: int


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Cells, of which only what lies within an ellipse around one of the places is shown."""

    cells: tuple[Cell, ...]
    places: tuple[tuple[float, float], ...]
    rx: float
    ry: float


@dataclass(frozen=True, kw_only=True)
class Response:
    plot: Plot
    marks: tuple[Mark, ...]
    surface: Surface | None
    best: Mark | None
    caption: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trial as a line: more than one part where values are missing in between."""

    key: int
    level: int | None
    status: str
    parts: tuple[str, ...]
    """Points as SVG takes them."""
    words: str


@dataclass(frozen=True, kw_only=True)
class Rung:
    """Where trials were stopped."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Curves:
    plot: Plot
    lines: tuple[Line, ...]
    ends: tuple[Mark, ...]
    rungs: tuple[Rung, ...]
    best: Mark | None
    caption: str


@dataclass(frozen=True, kw_only=True)
class Upright:
    """One axis of the parallel coordinates."""

    x: float
    name: str
    note: str
    labels: tuple[Label, ...]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    width: float
    height: float
    top: float
    bottom: float
    axes: tuple[Upright, ...]
    lines: tuple[Line, ...]
    caption: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A trial as a bar; `rest` is the part that was not run, as long as it would have been."""

    key: int
    x: float
    y: float
    width: float
    height: float
    status: str
    words: str
    rest: float = 0.0
    open_end: bool = False
    """It is not known when it ended."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    plot: Plot
    bars: tuple[Bar, ...]
    caption: str
    ruled: bool = True
    """Lines across at the labels of the upward axis."""
    crosses: bool = False
    """A cross after those that failed: there is room for it."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A confirmed configuration: one dot a seed, a bar at the mean, a line from mean - std to mean + std."""

    y: float
    label: str
    winner: bool
    dots: tuple[Label, ...]
    mean: float | None
    spread: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Seeds:
    plot: Plot
    rows: tuple[Dots, ...]


@dataclass(frozen=True, kw_only=True)
class ConfirmedRow:
    label: str
    config: str
    mean: str
    seeds: str
    values: str


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The best trial, and what several seeds say of its configuration."""

    trial: str
    key: int
    value: str
    config: tuple[tuple[str, str], ...]
    remark: str


@dataclass(frozen=True, kw_only=True)
class Value:
    """A cell of the table: what is read, and what it is sorted by ("" comes last)."""

    text: str
    sort: str
    numeric: bool = True


@dataclass(frozen=True, kw_only=True)
class Row:
    key: int
    status: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class SweepPage:
    title: str
    facts: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    summary: str
    metric: str
    better: str
    key: tuple[str, str] | None
    """What the ends of the scale of colours stand for, worst and best."""
    statuses: tuple[str, ...]
    """Those that occur."""
    space: tuple[tuple[str, str], ...]
    headline: Headline | None
    confirmed: tuple[ConfirmedRow, ...]
    verdicts: tuple[str, ...]
    seeds: Seeds | None
    response: Response | None
    curves: Curves | None
    parallel: Parallel | None
    columns: tuple[tuple[str, bool], ...]
    """(heading, whether numbers stand below it) of the table."""
    rows: tuple[Row, ...]
    timeline: Bars | None
    stops: tuple[tuple[str, str, str], ...]
    """(trial, status, when and why) of those that did not complete, in order of time."""
    costs: tuple[tuple[str, str], ...]
    saved: str
    spending: Bars | None
