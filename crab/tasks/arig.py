"""ARIG: name the object that sounds, and give the box around it in one frame.

Answer: `The sounding object is red circle. <obj>(16,32)(80,112)</obj>`, the top left corner and the bottom right one in
pixels of the picture scaled to 224 x 224. Edges are half-open: this box holds columns 16 to 79 and rows 32 to 111.

Score: two quantities that are both called cIoU, and the area under the success curve (`Evaluator` and
`Evaluator_iiou` in `utils.py` of kaistmm/SSLalignment; Senocak et al., ICCV 2023).
- `ciou_mean`: the IoU of the two boxes, mean over samples. (With a true map that is 0 or 1 the "consensus" IoU,
  overlap / (truth + what was predicted outside it), is just the IoU.)
- `ciou_at_50`: the share of samples with IoU >= 0.5.
- `auc`: the share with IoU >= t, integrated by trapezoids over t = 0, 0.05 ... 1. All samples pass t = 0, as in the
  official code, so the lowest AUC is 0.025 and not 0.
Complete-IoU, which Crab's release holds in `utils/ciou.py`, is another quantity, and not used.
Unreadable answers, boxes without area and boxes that leave the picture have IoU 0 and stay in every mean.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crab.samples import Sample
from crab.tasks.base import Answer, Metrics, Needs, distinct, full_target, normalise, paired

SIZE = 224
"""Side of the square picture that boxes are given in, pixels."""

THRESHOLDS = [0.05 * step for step in range(21)]
"""IoU thresholds of the success curve, as the official code computes them: 0.05 * 3 is a little above 0.15."""

TRAIN_BOXES = 300
"""At most so many train boxes are tried as constants."""

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2: pixel edges, half-open, 0 <= x1 < x2 <= 224 and so for y."""

_CORNER = r"\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)"
_ANSWER = re.compile(rf"([^<>]*)<obj>\s*{_CORNER}\s*{_CORNER}\s*</obj>\s*")
_EVENT = re.compile(r"sounding object is ([^.]+)\.", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ArigBox:
    box: Box
    event: str | None
    """None where the text names none."""


def instruction(second: int | None = None) -> str:
    """What is asked of a picture, or of one second of a video."""
    when = "" if second is None else f" at second {second}"
    return f"Name the object that is both seen and heard{when} and give its box."


def format_answer(event: str, box: Box) -> str:
    x1, y1, x2, y2 = box
    return f"The sounding object is {event}. <obj>({x1},{y1})({x2},{y2})</obj>"


def read_label(sample: Sample) -> ArigBox:
    """The exact label. ValueError naming the sample where it is not {"event": name, "box": [x1, y1, x2, y2]}."""
    try:
        x1, y1, x2, y2 = (int(edge) for edge in sample.label["box"])
        label = ArigBox(event=normalise(sample.label["event"]), box=(x1, y1, x2, y2))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(_misfit(sample)) from error
    if not _fits(label.box):
        raise ValueError(_misfit(sample))
    return label


def iou(one: Box, other: Box) -> float:
    """Shared pixels of two boxes, as a fraction of the pixels that either holds."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (_area(one) + _area(other) - shared)


def success_auc(ious: Sequence[float]) -> float:
    """Area under the share of `ious` that reach each of THRESHOLDS, by trapezoids."""
    shares = np.mean(np.asarray(ious)[None] >= np.asarray(THRESHOLDS)[:, None], axis=1)
    return float(np.trapezoid(shares, THRESHOLDS))


@dataclass(frozen=True)
class Arig:
    name: str = "arig"
    headline: str = "ciou_mean"
    perfect: float = 1.0
    needs: Needs = "box"

    def instruction(self, question: str | None) -> str:
        """`question` is the second of a video to look at, as a number; none for a picture."""
        if question is None or not question.strip():
            return instruction()
        if not re.fullmatch(r"\s*\d+\s*", question):
            raise ValueError(
                f"task {self.name} asks its own question; the only thing to add is the second of a video"
                f" to look at, such as '3', and {question!r} is no whole number"
            )
        return instruction(int(question))

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> ArigBox | None:
        """Strict: prose without tags, then one `<obj>` with a box inside the picture, then nothing."""
        return _parse(text)

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """ciou_mean, ciou_at_50, auc, event_accuracy (no name is a wrong one), parse_rate."""
        ious: list[float] = []
        events = parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            truth, prediction = read_label(sample), self.parse(answer.text)
            if prediction is None:
                ious.append(0.0)
                continue
            parsed += 1
            ious.append(iou(prediction.box, truth.box))
            events += prediction.event == truth.event
        count = len(samples)
        return {
            "ciou_mean": sum(ious) / count,
            "ciou_at_50": sum(value >= 0.5 for value in ious) / count,
            "auc": success_auc(ious),
            "event_accuracy": events / count,
            "parse_rate": parsed / count,
        }

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """IoU of the box; 0 for an unreadable answer."""
        prediction = self.parse(answer.text)
        return 0.0 if prediction is None else iou(prediction.box, read_label(sample).box)

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """The commonest event with: the whole picture, the mean train box, boxes between quantiles of the train boxes'
        edges (from the hull of nearly all to the core that nearly all share), and up to 300 train boxes."""
        if not train:
            return []
        labels = [read_label(sample) for sample in train]
        ((event, _),) = Counter(str(label.event) for label in labels).most_common(1)
        edges = np.array([label.box for label in labels])
        low = np.arange(0.0, 1.01, 0.1)
        near, far = np.quantile(edges, low, axis=0), np.quantile(edges, 1 - low, axis=0)
        built = [
            np.array([0, 0, SIZE, SIZE]),
            edges.mean(axis=0),
            np.median(edges, axis=0),
            *np.concatenate([near[:, :2], far[:, 2:]], axis=1),
        ]
        own = np.unique(edges, axis=0)
        built += list(
            own[np.linspace(0, len(own) - 1, min(len(own), TRAIN_BOXES)).round().astype(int)]
        )
        boxes = [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in np.round(built)]
        return distinct(format_answer(event, box) for box in boxes if _fits(box))


@lru_cache(maxsize=1024)
def _parse(text: str) -> ArigBox | None:
    match = _ANSWER.fullmatch(text)
    if match is None:
        return None
    box = int(match[2]), int(match[3]), int(match[4]), int(match[5])
    if not _fits(box):
        return None
    named = _EVENT.findall(match[1])
    return ArigBox(box=box, event=normalise(named[-1]) if named else None)


def _fits(box: Box) -> bool:
    x1, y1, x2, y2 = box
    return 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _misfit(sample: Sample) -> str:
    return (
        f"sample {sample.id!r}: ARIG label {sample.label!r} given, expected"
        f' {{"event": name, "box": [x1, y1, x2, y2]}} with 0 <= x1 < x2 <= {SIZE} and so for y'
    )
