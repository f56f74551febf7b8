"""AVQA: a question about a clip, answered with one word or name.

Answer: `<answer> two </answer>`.

Score: exact match after lower case and single blanks, over all questions (`accuracy`), by modality (`audio`, `visual`,
`audio_visual`) and by type (`audio_visual_counting` ...), as in MUSIC-AVQA (Li et al., CVPR 2022; `main_avst.py`).
Unreadable answers and words that are in no vocabulary are wrong and stay in every denominator (a public text scorer
drops them: 9059 of 9129 questions are left in its mean).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crab.samples import Sample
from crab.tasks.base import (
    Answer,
    Metrics,
    Needs,
    distinct,
    full_target,
    normalise,
    paired,
    with_question,
)

_ANSWER = re.compile(r"[^<>]*<answer>\s*([^<>]*[^<>\s])\s*</answer>\s*")


def instruction(question: str) -> str:
    return f"Answer this question: {question}"


def format_answer(answer: str) -> str:
    return f"<answer> {answer} </answer>"


def read_label(sample: Sample) -> str:
    """The exact answer. ValueError naming the sample where the label has none."""
    answer = sample.label.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(
            f'sample {sample.id!r}: AVQA label {sample.label!r} given, expected {{"answer": word, ...}}'
        )
    return normalise(answer)


def groups(sample: Sample) -> list[str]:
    """Metric names that a question counts for: its modality and its type; none where the label has no type."""
    names = [re.sub(r"\W+", "_", part).lower() for part in sample.label.get("type", [])]
    return ["_".join(names[: end + 1]) for end in range(len(names))]


@dataclass(frozen=True)
class Avqa:
    name: str = "avqa"
    headline: str = "accuracy"
    perfect: float = 1.0
    needs: Needs = "text"

    def instruction(self, question: str | None) -> str:
        return instruction(with_question(self.name, question, "How many objects are heard?"))

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> str | None:
        """Strict: prose without tags, then one `<answer>`, then nothing."""
        match = _ANSWER.fullmatch(text)
        return None if match is None else normalise(match[1])

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """accuracy, parse_rate, and the accuracy of every modality and type that occurs."""
        right: Counter[str] = Counter()
        total: Counter[str] = Counter()
        parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            prediction = self.parse(answer.text)
            parsed += prediction is not None
            for group in ["accuracy", *groups(sample)]:
                total[group] += 1
                right[group] += prediction == read_label(sample)
        scores = {group: right[group] / total[group] for group in total}
        return dict(sorted(scores.items())) | {"parse_rate": parsed / len(samples)}

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """1 for the right word, 0 for any other and for an unreadable answer."""
        return float(self.parse(answer.text) == read_label(sample))

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Every distinct train answer."""
        return distinct(format_answer(read_label(sample)) for sample in train)


def type_prior(train: Sequence[Sample], test: Sequence[Sample]) -> list[Answer]:
    """For each test question the commonest train answer to its type: blind to the clip, but not to the question.

    A harder baseline than one constant, and the one that shows whether a model looks at the clip at all.
    """
    by_type: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for sample in train:
        by_type[tuple(groups(sample))][read_label(sample)] += 1
        by_type[()][read_label(sample)] += 1
    if not by_type:
        raise ValueError("no train samples given; a prior needs at least one")
    return [
        Answer(text=format_answer(by_type.get(tuple(groups(s)), by_type[()]).most_common(1)[0][0]))
        for s in test
    ]
