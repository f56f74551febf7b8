"""What comes into the page: a sample with the answer to it."""

from dataclasses import dataclass

from crab.samples import Sample
from crab.tasks import Answer


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A sample with its answer (None: there is none), and whether the sample knows what is right."""

    sample: Sample
    answer: Answer | None
    finished: bool = True
    goodness: float | None = None
    title: str = ""
    has_truth: bool = True
