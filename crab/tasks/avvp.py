"""AVVP: every visual event and every audio event of a clip, with their spans.

Grammar (blanks between the parts are free; spans are whole seconds, half-open, 0 <= start < end <= 10):

    answer = "<visual_event>" list "</visual_event>" "<audio_event>" list "</audio_event>"
    list   = "none" | item { ";" item }
    item   = name "," span { span }                    a name may hold commas, never any of < > ( ) ;
    span   = "(" start " " end ")"

    <visual_event> red circle,(0 3)(5 8) ; blue square,(2 10) </visual_event> <audio_event> none </audio_event>

The tags are those of Crab's loader. `<audio>` itself marks the place of the sound in a prompt and is one special
token, so it cannot be a tag. Spans of one class in one list are united; spans that touch are one event, as on the
official 0/1 matrices.

Score (Tian et al., ECCV 2020; `utils/eval_metrics.py` and `main_avvp.py` of YapengTian/AVVP-ECCV20), per video, then
the mean over all videos. For each of audio A, visual V and AV (= A and V in the same second, of the label and of the
prediction), by class, TP, FP and FN are counted
- `segment_*`: over the ten seconds;
- `event_*`: over unbroken runs; a predicted run is TP if its IoU with any true run is >= 0.5 and FP otherwise, a true
  run that no predicted run meets so is FN. (Runs of a class do not touch, so at 0.5 none can meet two.)
F = 2 TP / (2 TP + FP + FN) of a class is averaged over the classes that occur in the label or the prediction; where
none does, F = 1. `*_type_f` is the mean of A, V and AV; `*_event_f` is F of the counts of A and V added up by class
first. Unreadable answers are empty predictions; a name that is no class counts as a class that was predicted in vain.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
from crab.tasks.spans import FULL, NUM_SECONDS, Span, grid, runs

INSTRUCTION = (
    "From the pictures and the sound, list every visual event and every audio event"
    " with its start and end times in seconds."
)
EMPTY = "none"

Grids = Mapping[str, int]
"class name -> seconds as bits"

Counts = tuple[int, int, int]
"TP, FP, FN"

_ITEM = r"\s*[^<>();]*[^<>();\s]\s*,\s*(?:\(\s*\d{1,2}\s+\d{1,2}\s*\)\s*)+"
_LIST = rf"(\s*{EMPTY}\s*|{_ITEM}(?:;{_ITEM})*)"
_ANSWER = re.compile(
    rf"[^<>]*<visual_event>{_LIST}</visual_event>\s*<audio_event>{_LIST}</audio_event>\s*",
    re.IGNORECASE,
)
_SPAN = re.compile(r"\(\s*(\d+)\s+(\d+)\s*\)")


@dataclass(frozen=True, kw_only=True)
class AvvpEvents:
    visual: Grids
    audio: Grids


NOTHING = AvvpEvents(visual={}, audio={})


def format_answer(
    visual: Iterable[tuple[str, int, int]], audio: Iterable[tuple[str, int, int]]
) -> str:
    """The answer for (name, start, end) triples; classes in order of first appearance in time, then by name."""
    return (
        f"<visual_event> {_format_list(_grids(visual))} </visual_event>"
        f" <audio_event> {_format_list(_grids(audio))} </audio_event>"
    )


def read_label(sample: Sample) -> AvvpEvents:
    """The exact label. ValueError naming the sample where it is not {"visual": [[name, s, e], ...], "audio": ...}."""
    try:
        return AvvpEvents(
            visual=_grids(sample.label["visual"]), audio=_grids(sample.label["audio"])
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"sample {sample.id!r}: AVVP label {sample.label!r} given, expected"
            f' {{"visual": [[name, start_s, end_s], ...], "audio": [...]}} within 0..{NUM_SECONDS}: {error}'
        ) from error


@dataclass(frozen=True)
class Avvp:
    name: str = "avvp"
    headline: str = "segment_type_f"
    perfect: float = 1.0
    needs: Needs = "text"

    def instruction(self, question: str | None) -> str:
        without_question(self.name, question)
        return INSTRUCTION

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> AvvpEvents | None:
        """Strict: prose without tags, then one answer of the grammar, then nothing. Nothing is salvaged from parts."""
        match = _ANSWER.fullmatch(text)
        if match is None:
            return None
        visual, audio = _parse_list(match[1]), _parse_list(match[2])
        return None if visual is None or audio is None else AvvpEvents(visual=visual, audio=audio)

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """segment_ and event_ F for audio, visual, av, type and event, and parse_rate."""
        total: defaultdict[str, float] = defaultdict(float)
        parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            prediction = self.parse(answer.text)
            parsed += prediction is not None
            for metric, value in video_scores(prediction or NOTHING, read_label(sample)).items():
                total[metric] += value
        scores = {metric: value / len(samples) for metric, value in total.items()}
        return scores | {"parse_rate": parsed / len(samples)}

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """`segment_type_f` of this clip; 0 for an unreadable answer."""
        prediction = self.parse(answer.text)
        return (
            0.0
            if prediction is None
            else video_scores(prediction, read_label(sample))[self.headline]
        )

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Every distinct train answer, the empty one, and for each share of the train clips the answer that lists
        each class in just the seconds in which at least that share of the clips has it."""
        labels = [read_label(sample) for sample in train]
        streams = [
            _frequencies([label.visual for label in labels]),
            _frequencies([label.audio for label in labels]),
        ]
        shares = sorted({count / len(train) for stream in streams for count in stream.values()})
        built = []
        for share in shares:
            lists = [
                [
                    (name, s, s + 1)
                    for (name, s), count in stream.items()
                    if count >= share * len(train)
                ]
                for stream in streams
            ]
            built.append(format_answer(lists[0], lists[1]))
        return distinct([sample.answer for sample in train] + [format_answer([], [])] + built)


def video_scores(prediction: AvvpEvents, truth: AvvpEvents) -> Metrics:
    """The ten official scores of one video."""
    streams = {
        "audio": (prediction.audio, truth.audio),
        "visual": (prediction.visual, truth.visual),
        "av": (_both(prediction.audio, prediction.visual), _both(truth.audio, truth.visual)),
    }
    scores: Metrics = {}
    for level, count in (("segment", segment_counts), ("event", event_counts)):
        counts = {
            stream: {name: count(p.get(name, 0), t.get(name, 0)) for name in p.keys() | t.keys()}
            for stream, (p, t) in streams.items()
        }
        for stream in streams:
            scores[f"{level}_{stream}_f"] = mean_f(counts[stream].values())
        scores[f"{level}_type_f"] = sum(scores[f"{level}_{stream}_f"] for stream in streams) / len(
            streams
        )
        pooled = [
            _add(counts["audio"].get(name, (0, 0, 0)), counts["visual"].get(name, (0, 0, 0)))
            for name in counts["audio"].keys() | counts["visual"].keys()
        ]
        scores[f"{level}_event_f"] = mean_f(pooled)
    return scores


def segment_counts(prediction: int, truth: int) -> Counts:
    return (
        (prediction & truth).bit_count(),
        (prediction & ~truth).bit_count(),
        (truth & ~prediction).bit_count(),
    )


@lru_cache(maxsize=1 << 16)
def event_counts(prediction: int, truth: int) -> Counts:
    """TP, FP, FN of unbroken runs; runs meet at IoU >= 0.5."""
    predicted, true = (
        [grid([run]) for run in runs(prediction)],
        [grid([run]) for run in runs(truth)],
    )
    hits = sum(any(_meet(p, t) for t in true) for p in predicted)
    missed = sum(not any(_meet(p, t) for p in predicted) for t in true)
    return hits, len(predicted) - hits, missed


def mean_f(counts: Iterable[Counts]) -> float:
    """Mean of 2 TP / (2 TP + FP + FN) over classes with any count; 1 where there is none."""
    values = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in counts if tp + fp + fn]
    return sum(values) / len(values) if values else 1.0


def _meet(one: int, other: int) -> bool:
    return 2 * (one & other).bit_count() >= (one | other).bit_count()


def _add(one: Counts, other: Counts) -> Counts:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _both(audio: Grids, visual: Grids) -> Grids:
    return {
        name: bits for name in audio.keys() & visual.keys() if (bits := audio[name] & visual[name])
    }


def _grids(events: Iterable[tuple[str, int, int]]) -> dict[str, int]:
    grids: dict[str, int] = {}
    for name, start, end in events:
        name = normalise(name)
        grids[name] = grids.get(name, 0) | grid([(start, end)])
    return {name: bits for name, bits in grids.items() if bits}


def _format_list(grids: Grids) -> str:
    def item(name: str) -> str:
        return f"{name}," + "".join(f"({start} {end})" for start, end in runs(grids[name]))

    by_time = sorted(grids, key=lambda name: (runs(grids[name]), name))
    return " ; ".join(item(name) for name in by_time) or EMPTY


def _parse_list(text: str) -> Grids | None:
    """Class -> seconds of a list that fits the grammar; None where a span is not 0 <= start < end <= 10."""
    if normalise(text) == EMPTY:
        return {}
    events: list[tuple[str, int, int]] = []
    for item in text.split(";"):
        name = item[: item.index("(")].rstrip().removesuffix(",")
        spans: list[Span] = [(int(start), int(end)) for start, end in _SPAN.findall(item)]
        if any(not start < end <= NUM_SECONDS for start, end in spans):
            return None
        events += [(name, start, end) for start, end in spans]
    return _grids(events)


def _frequencies(clips: Sequence[Grids]) -> Counter[tuple[str, int]]:
    """How many clips have a class on in a second, by (class, second)."""
    return Counter(
        (name, second)
        for grids in clips
        for name, bits in grids.items()
        for second in range(NUM_SECONDS)
        if (bits & FULL) >> second & 1
    )
