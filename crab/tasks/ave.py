"""AVE: name the one event that is both seen and heard, and its time range.

Answer: `<event> red circle </event> <range> 2,7 </range>`, whole seconds, half-open: seconds 2, 3, 4, 5 and 6.

Score: accuracy over N x 10 one-second segments, each labelled with the event's class inside its range and with
background outside (Tian et al., ECCV 2018; `compute_acc` of YapengTian/AVE-ECCV18). An unreadable answer predicts
background in all ten seconds. Two things that a public text scorer does differently, and that raise its figures, are
avoided: it takes the end second as part of the range, and it lets unreadable answers fall out of the comparison.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from crab.samples import Sample
from crab.tasks.base import Metrics, check_pairs, distinct, full_target, normalise
from crab.tasks.spans import FULL, NUM_SECONDS, grid

INSTRUCTION = (
    "Describe what is seen and heard, then name the event that is both seen and heard"
    " and give its time range in seconds."
)

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
        return grid([(self.start_s, self.end_s)])


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

    def score(self, samples: Sequence[Sample], texts: Sequence[str]) -> Metrics:
        """accuracy (segments), event_accuracy (name only), exact_match (name and range), parse_rate."""
        check_pairs(samples, texts, self.name)
        segments = events = exact = parsed = 0
        for sample, text in zip(samples, texts, strict=True):
            truth, prediction = read_label(sample), self.parse(text)
            if prediction is None:
                segments += (FULL & ~truth.seconds).bit_count()
                continue
            parsed += 1
            same_event = prediction.event == truth.event
            segments += (FULL & ~(truth.seconds | prediction.seconds)).bit_count()
            segments += (truth.seconds & prediction.seconds).bit_count() if same_event else 0
            events += same_event
            exact += prediction == truth
        count = len(samples)
        return {
            "accuracy": segments / (count * NUM_SECONDS),
            "event_accuracy": events / count,
            "exact_match": exact / count,
            "parse_rate": parsed / count,
        }

    def constants(self, train: Sequence[Sample]) -> list[str]:
        """Every distinct train answer, and every event of the train split with each of the 55 possible ranges."""
        events = distinct([read_label(sample).event for sample in train])
        built = [
            format_answer(event, start_s, end_s)
            for event in events
            for start_s in range(NUM_SECONDS)
            for end_s in range(start_s + 1, NUM_SECONDS + 1)
        ]
        return distinct([sample.answer for sample in train] + built)
