"""S4: mask the one object that sounds (AVSBench-object, single source; Zhou et al., ECCV 2022).

Answer: the span in which it is both seen and heard, its name and the mask tokens; grammar in mask_answer.py.

Score: `miou` and `f` over the frames with a true mask, as in mask_metrics.py. The train split of AVSBench has one mask
a clip, that of the first frame; frames without one are not judged. An unreadable text, a missing mask and a frame that
no span covers are empty masks, which stay in every mean. The name is not scored: AVSBench's own models give none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crab.samples import Sample
from crab.tasks.base import Answer, Metrics, Needs, full_target, paired, without_question
from crab.tasks.mask_answer import MaskItem, parse_mask_answer
from crab.tasks.mask_constants import mask_constants
from crab.tasks.mask_metrics import MaskScores, mask_iou, mask_pairs, no_masks

INSTRUCTION = "Name the object that makes the sound, and mask it in each second."

THRESHOLD = 0.5
"A pixel belongs to the mask, for IoU, where its probability is larger."


@dataclass(frozen=True)
class S4:
    name: str = "s4"
    headline: str = "miou"
    perfect: float = 1.0
    needs: Needs = "mask"

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
        """miou, f (left out where every truth is empty), parse_rate. ValueError where no sample has a true mask."""
        scores, parsed = MaskScores(THRESHOLD), 0
        for sample, answer in paired(samples, answers, self.name):
            parsed += self.parse(answer.text) is not None
            for probability, truth in mask_pairs(sample, answer):
                scores.add(probability, truth)
        if not scores.num_frames:
            raise no_masks(samples, self.name)
        return scores.metrics("miou", "f") | {"parse_rate": parsed / len(samples)}

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """Mean IoU of the frames with a true mask; 1 where there is none to miss."""
        ious = [mask_iou(p > THRESHOLD, truth) for p, truth in mask_pairs(sample, answer)]
        return sum(ious) / len(ious) if ious else 1.0

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Empty masks, full ones, and the mean of the train masks at several thresholds."""
        return mask_constants(train)
