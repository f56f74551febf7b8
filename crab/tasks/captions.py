"""How near a caption comes to the true ones: CIDEr-D, BLEU-4 and chrF++ over words.

The usual scorer (`pycocoevalcap`) splits captions with a Java program, and METEOR needs Java or a download of WordNet.
Here words are lower-cased runs of letters and digits, with inner hyphens and apostrophes, and METEOR is left out.
Against figures in the literature that moves the third digit where captions hold forms such as "dog's".

BLEU and chrF++ (Popovic, WMT 2017: F of character 1- to 6-grams and word 1- and 2-grams) come from sacrebleu. No kept
library has CIDEr-D without Java or several hundred MB of dependencies, so it stands here: Vedantam et al., CVPR
2015, with the choices of the authors' code, by which published figures are made. There the counts of n-grams are not
divided by the caption's length; it matters, as CIDEr-D clips them.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF

MAX_N = 4
"""N-grams of one to four words."""

SIGMA = 6.0
"""Width of CIDEr-D's penalty on the difference of lengths, words."""

SCALE = 10.0
"""CIDEr-D of a caption that equals its one reference."""

NGram = tuple[str, ...]

_WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str]) -> Counter[NGram]:
    """How often each run of one to four words occurs."""
    return Counter(
        tuple(tokens[start : start + n])
        for n in range(1, MAX_N + 1)
        for start in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class Weighed:
    """One caption as CIDEr-D sees it."""

    weights: dict[NGram, float]
    norms: list[float]
    """Euclidean norm of the weights of the n-grams of each n."""
    length: int
    """Number of words."""

    def unit(self) -> dict[NGram, float]:
        """The weights, those of each n divided by their norm."""
        return {
            gram: weight / norm
            for gram, weight in self.weights.items()
            if (norm := self.norms[len(gram) - 1])
        }


class CiderD:
    """CIDEr-D against fixed references, which also say how rare each n-gram is.

    An n-gram weighs its count times log(samples / samples with it in a reference), so what is said of every sample
    weighs nothing. Of a caption c and a reference r, for each n,

        exp(-(words in c - words in r)^2 / (2 sigma^2)) * sum(min(c, r) * r) / (|c| |r|)

    is averaged over n and over the references, and multiplied by 10. Two consequences: with a single sample every
    weight is log 1 = 0, and so is the score; and a true caption of under four words cannot reach 10.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        """`references`: the true captions of each sample, at least one each."""
        split = [[words(text) for text in texts] for texts in references]
        self._log_samples = math.log(len(split))
        self._samples_with = Counter(
            gram for texts in split for gram in set().union(*(ngrams(text) for text in texts))
        )
        self.references = [[self._weigh(text) for text in texts] for texts in split]

    def score(self, caption: str, sample: int) -> float:
        """0..10 of a caption for the sample of that number."""
        given = self._weigh(words(caption))
        likenesses = [_likeness(given, true) for true in self.references[sample]]
        return SCALE * sum(likenesses) / len(likenesses)

    def _weigh(self, tokens: Sequence[str]) -> Weighed:
        weights = {
            gram: count * (self._log_samples - math.log(max(1, self._samples_with[gram])))
            for gram, count in ngrams(tokens).items()
        }
        squares = [0.0] * MAX_N
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight * weight
        return Weighed(weights, [math.sqrt(square) for square in squares], len(tokens))


def consensus(captions: Sequence[str]) -> dict[str, float]:
    """How like all the others each different caption is: the cosines of CIDEr-D, without clipping and lengths.

    Without these two the mean over all captions is one dot product with their mean, so 25,000 take seconds.
    """
    weighed = [one for (one,) in CiderD([[caption] for caption in captions]).references]
    middle: defaultdict[NGram, float] = defaultdict(float)
    for one in weighed:
        for gram, weight in one.unit().items():
            middle[gram] += weight / len(captions)
    return {
        caption: sum(weight * middle[gram] for gram, weight in one.unit().items()) / MAX_N
        for caption, one in zip(captions, weighed, strict=True)
    }


def bleu_4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of the whole set (not smoothed), 0..1. An empty caption costs its reference's length."""
    scorer = BLEU(tokenize="none", smooth_method="none", force=True)
    score = scorer.corpus_score([_joined(text) for text in captions], _streams(references))  # type: ignore[arg-type]  # of None
    return min(score.score / 100, 1.0)  # it may be an ulp above


def chrf(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF++ of the whole set, 0..1; with one sample, of that caption."""
    scorer = CHRF(word_order=2)
    score = scorer.corpus_score([_joined(text) for text in captions], _streams(references))  # type: ignore[arg-type]  # of None
    return min(score.score / 100, 1.0)


def _likeness(given: Weighed, true: Weighed) -> float:
    """0..1, before the scale of 10."""
    shared = [0.0] * MAX_N
    for gram, weight in given.weights.items():
        if gram in true.weights:
            shared[len(gram) - 1] += min(weight, true.weights[gram]) * true.weights[gram]
    cosines = [
        dot / (one * other) if one and other else 0.0
        for dot, one, other in zip(shared, given.norms, true.norms, strict=True)
    ]
    return math.exp(-((given.length - true.length) ** 2) / (2 * SIGMA**2)) * sum(cosines) / MAX_N


def _joined(text: str) -> str:
    return " ".join(words(text))


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """As sacrebleu takes them: one list of references after the other, None where a sample has fewer than another."""
    return [
        [_joined(texts[number]) if number < len(texts) else None for texts in references]
        for number in range(max(len(texts) for texts in references))
    ]
