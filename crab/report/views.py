"""What the page shows, as plain values: the templates read these and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame and the overlays on it: paths beside the page; None where there is nothing to lay over."""

    picture: str
    label: str
    predicted: str | None = None
    true: str | None = None
    verdict: str = ""
    """For example "IoU 0.82"."""


@dataclass(frozen=True, kw_only=True)
class FrameRow:
    """Frames side by side; a title where an example has more than one row."""

    frames: tuple[Frame, ...]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Box:
    """x, y, width, height in pixels of the frame."""

    picture: str
    label: str
    size: int
    predicted: tuple[int, int, int, int] | None
    true: tuple[int, int, int, int] | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One event: when it was predicted, and when it is true. None where no truth is known."""

    name: str
    predicted: tuple[Span, ...]
    true: tuple[Span, ...] | None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    lanes: Mapping[str, tuple[Lane, ...]]
    """By stream: seen, heard, or both."""
    seconds: int = 10


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text in its two parts: prose, then what begins with the first tag."""

    prose: str
    tagged: str


@dataclass(frozen=True, kw_only=True)
class Example:
    title: str
    """Its place among the others, such as "worst 1 of 200"."""
    sample_id: str
    goodness: float | None
    request: str
    said: Text | None
    """None: there is no answer."""
    notes: tuple[str, ...]
    """What a reader must know: cannot be read, cut off, has no sound."""
    expected: tuple[Text, ...]
    """More than one where several answers are right (captions); empty where none is known."""
    answer: str = ""
    wanted: str = ""
    """Short answers side by side, where an answer is a word or a sentence."""
    rows: tuple[FrameRow, ...] = ()
    box: Box | None = None
    timeline: Timeline | None = None
    legend: tuple[tuple[str, str], ...] = ()
    """(colour, name) of classes."""
    sound: str | None = None
    sound_s: float = 0.0

    @property
    def overlays(self) -> bool:
        """Whether there is anything that could be shown or hidden."""
        frames = [frame for row in self.rows for frame in row.frames]
        return self.box is not None or any(f.predicted or f.true for f in frames)

    @property
    def has_truth(self) -> bool:
        return bool(self.expected)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A line of the table of scores: the headline of a task between the best constant and perfect."""

    task: str
    title: str
    metric: str
    value: float
    constant: float | None
    constant_text: str
    best_possible: float
    """The headline of right answers: less than perfect where these samples allow less."""
    way: float | None
    """How far the score lies from the best constant (0) to the best possible (1); None without a constant."""
    parse_rate: float
    num_samples: int
    missing: int
    others: tuple[tuple[str, float, float | None], ...] = ()
    """(metric, value, of the constant) of the other metrics."""
    remark: str = ""

    @property
    def verdict(self) -> str:
        """Also the class in the style sheet."""
        if self.way is None:
            return "unknown"
        return "below" if self.way < 0 else "short" if self.way < 0.5 else "beyond"


@dataclass(frozen=True, kw_only=True)
class Section:
    task: str
    title: str
    score: Score | None
    examples: tuple[Example, ...]
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over the steps of training; points are (step, value)."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    scores: tuple[Score, ...] = ()
    curves: tuple[Curve, ...] = field(default=())
    remarks: tuple[str, ...] = ()
