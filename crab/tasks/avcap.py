"""AVCap: say in one or two plain sentences what is seen and heard.

Answer: the caption itself, without tags. Since nothing would tell the two apart, no reasoning is learnt before it.

Score: `cider` (CIDEr-D, 0 to 10, the headline), `bleu_4` and `chrf` (0 to 1); see `captions.py`. CIDEr-D is 10 where
every caption equals its one reference of four words or more. An unreadable answer is an empty caption and scores 0.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from crab.samples import Sample
from crab.tasks.base import Answer, Metrics, Needs, distinct, paired, without_question
from crab.tasks.captions import SCALE, CiderD, bleu_4, chrf, consensus, words

INSTRUCTION = "Write a caption of what is seen and heard."

CANDIDATES = 50
"""At most so many train captions are tried as constants."""


def read_label(sample: Sample) -> tuple[str, ...]:
    """The true captions. ValueError naming the sample where the label is not {"captions": [text, ...]}."""
    captions = sample.label.get("captions")
    if (
        not isinstance(captions, list | tuple)
        or not captions
        or not all(isinstance(caption, str) and words(caption) for caption in captions)
    ):
        raise ValueError(
            f'sample {sample.id!r}: AVCap label {sample.label!r} given, expected {{"captions": [text, ...]}}'
            " with at least one caption, and words in each"
        )
    return tuple(captions)


@dataclass(frozen=True)
class Avcap:
    name: str = "avcap"
    headline: str = "cider"
    perfect: float = SCALE
    needs: Needs = "text"

    def instruction(self, question: str | None) -> str:
        without_question(self.name, question)
        return INSTRUCTION

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return sample.answer

    def parse(self, text: str) -> str | None:
        """The text, where it holds a word and no tag."""
        caption = text.strip()
        return None if "<" in caption or ">" in caption or not words(caption) else caption

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """cider (0..10), bleu_4, chrf, parse_rate."""
        found = [self.parse(answer.text) for _, answer in paired(samples, answers, self.name)]
        references = tuple(read_label(sample) for sample in samples)
        captions = [caption or "" for caption in found]
        judge = _cider_d(references)
        count = len(samples)
        return {
            "cider": sum(judge.score(text, number) for number, text in enumerate(captions)) / count,
            "bleu_4": bleu_4(captions, references),
            "chrf": chrf(captions, references),
            "parse_rate": sum(caption is not None for caption in found) / count,
        }

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """chrF++: CIDEr-D of one caption depends on the other samples. 0 for an unreadable answer."""
        return chrf([self.parse(answer.text) or ""], [read_label(sample)])

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """The 50 train captions that CIDEr-D finds most like all of them, and the commonest one."""
        captions = [caption for sample in train for caption in read_label(sample)]
        if not captions:
            return []
        likeness = consensus(captions)
        typical = heapq.nlargest(CANDIDATES, likeness, key=lambda caption: likeness[caption])
        return distinct([*typical, Counter(captions).most_common(1)[0][0]])


@lru_cache(maxsize=1)
def _cider_d(references: tuple[tuple[str, ...], ...]) -> CiderD:
    """Kept for the next call: constants are scored against the same references one after the other."""
    return CiderD(references)
