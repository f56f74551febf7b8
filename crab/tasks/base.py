"""What a task is: how it asks, what it wants to hear, how it reads an answer and how it scores.

To add a task, write one file beside this one and add one row to the table in `__init__.py`. A task is stateless.
Scores are fractions between 0 and 1 with full denominators: a sample without a readable answer stays in every mean,
as a wrong or an empty prediction, and `parse_rate` says how many were readable.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from crab.samples import Sample

Metrics = dict[str, float]


class Task(Protocol):
    @property
    def name(self) -> str:
        """The value of `Sample.task`."""

    @property
    def headline(self) -> str:
        """The metric that baselines are chosen by and that tables show first."""

    def request(self, sample: Sample) -> str:
        """The sentence that follows the media in the prompt."""

    def target(self, sample: Sample) -> str:
        """The text to be learnt: reasoning, then the tagged answer."""

    def parse(self, text: str) -> object | None:
        """The prediction in a generated text, or None where the text is not exactly of the task's grammar."""

    def score(self, samples: Sequence[Sample], texts: Sequence[str]) -> Metrics:
        """Metrics over all `samples`; `texts[i]` is the generated text for `samples[i]` ("" where there is none)."""

    def constants(self, train: Sequence[Sample]) -> list[str]:
        """Answers that a model blind to the clip could always give: every distinct train answer, and built ones."""


def full_target(sample: Sample) -> str:
    """Reasoning and answer joined by one blank; the answer alone where there is no reasoning."""
    return f"{sample.reasoning} {sample.answer}".strip()


def normalise(name: str) -> str:
    """Names are compared in lower case with single blanks: `" Red  Circle "` is `red circle`."""
    return re.sub(r"\s+", " ", name).strip().casefold()


def check_pairs(samples: Sequence[Sample], texts: Sequence[str], task: str) -> None:
    """ValueError unless there is one text a sample, at least one sample, and every sample is of `task`."""
    if len(samples) != len(texts):
        raise ValueError(
            f"{len(texts)} texts given for {len(samples)} {task} samples; give one text a sample, in the same order,"
            ' and "" for a sample without an answer'
        )
    if not samples:
        raise ValueError(f"no {task} samples given; a score needs at least one")
    for sample in samples:
        if sample.task != task:
            raise ValueError(f"sample {sample.id!r} is of task {sample.task!r}, expected {task!r}")


def distinct(answers: Sequence[str]) -> list[str]:
    """Each answer once, in order of first appearance."""
    return list(dict.fromkeys(answers))
