"""Ref-AVS: mask what an expression means, such as "the one that sounds last" (Wang et al., ECCV 2024).

Label: {"expression": text, "subset": "seen" | "unseen" | "null"}. Unseen: classes that are never meant in the train
split. Null: the expression means nothing in this clip, and all masks must be empty; its right answer is
`<range> none </range>`. Grammar in mask_answer.py.

Score (`utils/metric/utility.py` of GeWu-Lab/Ref-AVS), by subset:
- `seen_j`, `unseen_j`: mean IoU of the pixels with p > 0.4. (The official utility has 0.4; Crab's release has 0.5.)
- `seen_f`, `unseen_f`: F as in mask_metrics.py.
- `null_s`: root of the share of pixels with p > 0.5 in all frames of a clip, mean over expressions. Less is better.
  Where each frame is a sample, as the importer makes them of the official pictures, the frames of one clip and
  expression are put together first: a mean of their roots would be lower. (The official script takes the root over a
  batch of four expressions.)
- `j`: mean IoU of seen and unseen together. In a set of null expressions alone it is the IoU of their background, so
  that there always is a headline; a set with others does not count them, because an answer that is always empty would
  have them all right.
Metrics of a subset that is not there are left out. The official script judges at 256 x 256, where a truth scaled by
blending is a little too large; here masks are judged at 224 x 224 with picked pixels, as in the other tasks.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from crab.samples import Sample
from crab.tasks.base import Answer, Metrics, Needs, full_target, paired, with_question
from crab.tasks.mask_answer import MaskItem, parse_mask_answer
from crab.tasks.mask_constants import mask_constants
from crab.tasks.mask_metrics import MaskScores, empty_score, mask_iou, mask_pairs, no_masks

J_THRESHOLD = 0.4
S_THRESHOLD = 0.5

Subset = Literal["seen", "unseen", "null"]


@dataclass(frozen=True, kw_only=True)
class Expression:
    expression: str
    subset: Subset


def instruction(expression: str) -> str:
    """What is asked of a clip."""
    return f"Mask in each second what is meant by: {expression}."


def read_label(sample: Sample) -> Expression:
    """The exact label. ValueError naming the sample where it is not {"expression": text, "subset": ...}."""
    expression, subset = sample.label.get("expression"), sample.label.get("subset")
    if not isinstance(expression, str) or subset not in get_args(Subset):
        raise ValueError(
            f"sample {sample.id!r}: Ref-AVS label {sample.label!r} given, expected"
            ' {"expression": text, "subset": "seen", "unseen" or "null"}'
        )
    return Expression(expression=expression, subset=cast(Subset, subset))


@dataclass(frozen=True)
class RefAvs:
    name: str = "ref-avs"
    headline: str = "j"
    perfect: float = 1.0
    needs: Needs = "mask"

    def instruction(self, question: str | None) -> str:
        """`question` is the expression."""
        return instruction(with_question(self.name, question, "the object that sounds first"))

    def request(self, sample: Sample) -> str:
        return sample.instruction

    def target(self, sample: Sample) -> str:
        return full_target(sample)

    def parse(self, text: str) -> tuple[MaskItem, ...] | None:
        return parse_mask_answer(text)

    def score(self, samples: Sequence[Sample], answers: Iterable[Answer]) -> Metrics:
        """j, seen_j, seen_f, unseen_j, unseen_f, null_s where there are such samples, and parse_rate.

        ValueError where no sample has a true mask.
        """
        subsets = {subset: MaskScores(J_THRESHOLD) for subset in get_args(Subset)}
        null_shares: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
        "(clip, expression) -> share of each of its frames that is predicted; all of it where the text is unreadable"
        parsed = 0
        for sample, answer in paired(samples, answers, self.name):
            readable = self.parse(answer.text) is not None
            parsed += readable
            label = read_label(sample)
            for probability, truth in mask_pairs(sample, answer):
                subsets[label.subset].add(probability, truth)
                if label.subset == "null":
                    share = float(np.mean(probability > S_THRESHOLD)) if readable else 1.0
                    null_shares[sample.clip, label.expression].append(share)
        referred = [subsets["seen"], subsets["unseen"]]
        judged = [scores for scores in referred if scores.num_frames] or [subsets["null"]]
        num_frames = sum(scores.num_frames for scores in judged)
        if not num_frames:
            raise no_masks(samples, self.name)
        metrics = {"j": sum(scores.total_iou for scores in judged) / num_frames}
        metrics |= subsets["seen"].metrics("seen_j", "seen_f")
        metrics |= subsets["unseen"].metrics("unseen_j", "unseen_f")
        if null_shares:
            scores = [empty_score(shares) for shares in null_shares.values()]
            metrics["null_s"] = sum(scores) / len(scores)
        return metrics | {"parse_rate": parsed / len(samples)}

    def goodness(self, sample: Sample, answer: Answer) -> float:
        """Mean IoU of the frames with a true mask; 1 - S for a null expression."""
        pairs = mask_pairs(sample, answer)
        if not pairs:
            return 1.0
        if read_label(sample).subset == "null":
            if self.parse(answer.text) is None:
                return 0.0
            return 1 - empty_score(np.stack([p for p, _ in pairs]) > S_THRESHOLD)
        return sum(mask_iou(p > J_THRESHOLD, truth) for p, truth in pairs) / len(pairs)

    def constants(self, train: Sequence[Sample]) -> list[Answer]:
        """Empty masks, full ones, and the mean of the train masks at several thresholds."""
        return mask_constants(train)
