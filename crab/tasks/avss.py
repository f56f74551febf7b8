"""AVSS: give each pixel the class of the sounding object that it shows (AVSBench-semantic; Zhou et al., IJCV 2024).

Answer: for each span the names of what sounds, and one group of mask tokens; grammar in mask_answer.py. The masks are
class numbers, 0 is the background, and frames in no span are all background. The label says how many classes there are
and what they are called: {"num_classes": 71, "names": {"1": "accordion", ...}}, background included in the number.

Score: `miou` and `f` over all classes, by the definition of `ClassScores`, over the frames with a true map. The names
in the text are not scored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crab.samples import Sample
from crab.tasks.base import Answer, Metrics, Needs, full_target, paired, without_question
from crab.tasks.mask_answer import MaskItem, parse_mask_answer
from crab.tasks.mask_constants import class_constants
from crab.tasks.mask_metrics import ClassScores, class_iou, class_pairs, no_masks

INSTRUCTION = (
    "Name every object that is seen and makes a sound, and mask each with its class in each second."
)


def num_classes(samples: Sequence[Sample]) -> int:
    """The one number of classes that the labels of all samples give. ValueError naming a sample otherwise."""
    expected: int | None = None
    for sample in samples:
        number = sample.label.get("num_classes")
        if not isinstance(number, int) or not 2 <= number <= 256:
            raise ValueError(
                f"sample {sample.id!r}: AVSS label with num_classes = {number!r} given, expected a whole number of"
                " classes in 2..256, the background included"
            )
        if expected not in (None, number):
            raise ValueError(
                f"sample {sample.id!r} has {number} classes and samples before it {expected};"
                " data sets with different classes must be scored apart"
            )
        expected = number
    if expected is None:
        raise ValueError("no avss samples given; a score needs at least one")
    return expected


@dataclass(frozen=True)
class Avss:
    name: str = "avss"
    headline: str = "miou"
    perfect: float = 1.0
    "where every class is in the truth; see `miou_attainable`"
    needs: Needs = "classes"

    def instruction(self, question: str | None) -> str:
        without_question(self.name, question)
        return INSTRUCTION

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> tuple[MaskItem, ...] | None:
        return parse_mask_answer(text)

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """miou, f, miou_no_background, f_no_background, miou_attainable, parse_rate.

        ValueError where no sample has a true map.
        """
        scores: ClassScores | None = None
        parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            if scores is None:
                scores = ClassScores(num_classes(samples))
            parsed += self.parse(answer.text) is not None
            for prediction, truth in class_pairs(sample, answer, scores.num_classes):
                scores.add(prediction, truth)
        if scores is None or not scores.num_frames:
            raise no_masks(samples, self.name)
        return scores.metrics() | {"parse_rate": parsed / len(samples)}

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """Mean over frames of the IoU of the classes seen or predicted there, background left out."""
        number = num_classes([sample])
        ious = [class_iou(p, truth, number) for p, truth in class_pairs(sample, answer, number)]
        return sum(ious) / len(ious) if ious else 1.0

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """All background, each pixel's commonest class, and where objects are common: the commonest there, and each
        of the commonest classes."""
        return class_constants(train, num_classes(train)) if train else class_constants([], 1)
