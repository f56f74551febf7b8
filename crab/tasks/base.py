"""What a task is: how it asks, what it wants to hear, how it reads an answer and how it scores.

To add a task, write one file beside this one, add one row to the table in `__init__.py` and one to the table in
`tests/unit/test_tasks.py`. A task is stateless.

Scores are fractions between 0 and 1 with full denominators (CIDEr keeps its own scale): a sample without a readable
answer stays in every mean, as a wrong or an empty prediction, and `parse_rate` says how many were readable.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from crab.samples import Sample

Metrics = dict[str, float]
Needs = Literal["text", "box", "mask", "classes"]
"""What an answer shows beyond its words: a box, a mask, or a class a pixel."""


@dataclass(frozen=True, kw_only=True)
class Masks:
    frames: tuple[int, ...]
    """Numbers of the frames that `values` stands for, in its order."""
    values: NDArray[np.floating] | NDArray[np.uint8]
    """[T, H, W]: probability of the mask, or (task avss) class number. T may be 1: the same for all frames."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was said of one sample: a text ("": none), and masks where the task draws (None: all empty)."""

    text: str
    masks: Masks | None = None


class Task(Protocol):
    @property
    def name(self) -> str:
        """The value of `Sample.task`."""

    @property
    def headline(self) -> str:
        """The metric that baselines are chosen by and that tables show first. More is better."""

    @property
    def perfect(self) -> float:
        """The headline's value when every answer is right: 1, or 10 for CIDEr.

        Where the samples allow less (a set without some class), `score` gives that as `{headline}_attainable`.
        """

    @property
    def needs(self) -> Needs:
        """What an answer shows beyond its words."""

    def instruction(self, question: str | None) -> str:
        """The instruction for a loose clip. ValueError where a question is missing, or given and not wanted."""

    def request(self, sample: Sample) -> str:
        """The sentence that follows the media in the prompt."""

    def target(self, sample: Sample) -> str:
        """The text to be learnt: reasoning, then the tagged answer."""

    def parse(self, text: str) -> object | None:
        """The prediction in a generated text, or None where the text is not exactly of the task's grammar."""

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """Metrics over all `samples`; the i-th answer is for `samples[i]`.

        Answers are taken one at a time and let go, so that their masks can be loaded as they are needed.
        """

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """How good one answer is, 0 to 1: to show the worst first. Not a metric."""

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Answers that a model blind to the clip could always give: those of the train split (the most typical of them
        where they would be too many to score) and built ones. Empty where there is no train sample to build from."""


def full_target(sample: Sample) -> str:
    """Reasoning and answer joined by one blank; the answer alone where there is no reasoning."""
    return " ".join(part.strip() for part in (sample.reasoning, sample.answer) if part.strip())


def normalise(name: str) -> str:
    """Names are compared in lower case with single blanks: `" Red  Circle "` is `red circle`."""
    return re.sub(r"\s+", " ", name).strip().casefold()


def paired(
    samples: Sequence[Sample], answers: Iterable[Answer], task: str
) -> Iterator[tuple[Sample, Answer]]:
    """Each sample with its answer, taken one at a time.

    ValueError unless there is a sample, every sample is of `task`, and there are as many answers as samples.
    """
    if not samples:
        raise ValueError(f"no {task} samples given; a score needs at least one")
    for sample in samples:
        if sample.task != task:
            raise ValueError(f"sample {sample.id!r} is of task {sample.task!r}, expected {task!r}")
    source = iter(answers)
    for number, sample in enumerate(samples):
        answer = next(source, None)
        if answer is None:
            raise ValueError(_miscounted(f"{number} answers", len(samples), task))
        yield sample, answer
    if next(source, None) is not None:
        raise ValueError(_miscounted(f"more than {len(samples)} answers", len(samples), task))


def _miscounted(given: str, samples: int, task: str) -> str:
    return (
        f"{given} given for {samples} {task} samples; give one answer a sample, in the same order,"
        ' and Answer(text="") for a sample without one'
    )


def without_question(task: str, question: str | None) -> None:
    """ValueError where a question is given to a task that asks its own."""
    if question:
        raise ValueError(f"task {task} asks its own question; leave out {question!r}")


def with_question(task: str, question: str | None, example: str) -> str:
    """The question, or ValueError where there is none."""
    if not question or not question.strip():
        raise ValueError(f"task {task} needs a question, such as {example!r}")
    return question


def distinct(texts: Iterable[str]) -> list[Answer]:
    """An answer for each different text, in order of first appearance."""
    return [Answer(text=text) for text in dict.fromkeys(texts)]
