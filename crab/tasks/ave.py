"""AVE: name the one event that is both seen and heard, and its time range.

Answer: `<event> red circle </event> <range> 2,7 </range>`, whole seconds, half-open: seconds 2, 3, 4, 5 and 6.

Score: accuracy over N x 10 one-second segments, each labelled with the event's class inside its range and with
background outside (Tian et al., ECCV 2018; `compute_acc` of YapengTian/AVE-ECCV18). An unreadable answer predicts
background in all ten seconds. Two things that a public text scorer does differently, and that raise its figures, are
avoided: it takes the end second as part of the range, and it lets unreadable answers fall out of the comparison.
"""

import re
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
    without_question,
)
from crab.tasks.spans import FULL, NUM_SECONDS, grid

INSTRUCTION = (
    "Describe what is seen and heard, then name the event that is both seen and heard"
    " and give its time range in seconds."
)

BACKGROUND = "background"
"""The 29th class of the official labels: nothing is seen and heard at once."""

_ANSWER = re.compile(
    r"[^<>]*<event>\s*([^<>]*[^<>\s])\s*</event>\s*<range>\s*(\d{1,2})\s*,\s*(\d{1,2})\s*</range>\s*"
)


@dataclass(frozen=True, kw_only=True)
class AveEvent:
    event: str
    start_s: int
    end_s: int
    "half-open: the event lasts end_s - start_s seconds"

    @property
    def seconds(self) -> int:
        """The seconds that are not background, as bits."""
        return 0 if self.event == BACKGROUND else grid([(self.start_s, self.end_s)])


def format_answer(event: str, start_s: int, end_s: int) -> str:
    return f"<event> {event} </event> <range> {start_s},{end_s} </range>"


def read_label(sample: Sample) -> AveEvent:
    """The exact label. ValueError naming the sample where it is not {"event", "start_s", "end_s"}."""
    try:
        label = AveEvent(
            event=normalise(sample.label["event"]),
            start_s=int(sample.label["start_s"]),
            end_s=int(sample.label["end_s"]),
        )
        grid([(label.start_s, label.end_s)])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"sample {sample.id!r}: AVE label {sample.label!r} given, expected"
            f' {{"event": name, "start_s": int, "end_s": int}} within 0..{NUM_SECONDS}: {error}'
        ) from error
    return label


@dataclass(frozen=True)
class Ave:
    name: str = "ave"
    headline: str = "accuracy"
    perfect: float = 1.0
    needs: Needs = "text"

    def instruction(self, question: str | None) -> str:
        without_question(self.name, question)
        return INSTRUCTION

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> AveEvent | None:
        """Strict: prose without tags, then one answer of the grammar with 0 <= start < end <= 10, then nothing."""
        match = _ANSWER.fullmatch(text)
        if match is None:
            return None
        event, start_s, end_s = normalise(match[1]), int(match[2]), int(match[3])
        if not start_s < end_s <= NUM_SECONDS:
            return None
        return AveEvent(event=event, start_s=start_s, end_s=end_s)

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """accuracy (segments), event_accuracy (name only), exact_match (name and range), parse_rate."""
        segments = events = exact = parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            truth, prediction = read_label(sample), self.parse(answer.text)
            segments += right_seconds(prediction, truth)
            if prediction is not None:
                parsed += 1
                events += prediction.event == truth.event
                exact += prediction == truth
        count = len(samples)
        return {
            "accuracy": segments / (count * NUM_SECONDS),
            "event_accuracy": events / count,
            "exact_match": exact / count,
            "parse_rate": parsed / count,
        }

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """Share of seconds that are right; 0 for an unreadable answer."""
        prediction = self.parse(answer.text)
        return (
            0.0
            if prediction is None
            else right_seconds(prediction, read_label(sample)) / NUM_SECONDS
        )

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Every distinct train answer, and every event of the train split with each of the 55 possible ranges."""
        events = dict.fromkeys(read_label(sample).event for sample in train)
        built = [
            format_answer(event, start_s, end_s)
            for event in events
            for start_s in range(NUM_SECONDS)
            for end_s in range(start_s + 1, NUM_SECONDS + 1)
        ]
        return distinct([sample.answer for sample in train] + built)


def right_seconds(prediction: AveEvent | None, truth: AveEvent) -> int:
    """How many of the ten seconds have the right class. No prediction is background throughout."""
    if prediction is None:
        return (FULL & ~truth.seconds).bit_count()
    background = FULL & ~(truth.seconds | prediction.seconds)
    shared = truth.seconds & prediction.seconds if prediction.event == truth.event else 0
    return background.bit_count() + shared.bit_count()
