"""AVCap: plain captions; CIDEr-D, BLEU-4 and chrF++ by hand and against the usual scorer."""

import math
import random
from collections.abc import Iterator

import pytest
from support.answers import said

from crab.evaluate import constant_baseline
from crab.samples import Sample
from crab.tasks.avcap import CANDIDATES, Avcap, read_label
from crab.tasks.captions import CiderD, bleu_4, chrf, consensus, words

AVCAP = Avcap()


def sample(*captions: str, number: int = 0, reasoning: str = "") -> Sample:
    return Sample(
        id=f"s{number}",
        task="avcap",
        split="test",
        clip="c",
        video="v.mp4",
        instruction="Describe it.",
        reasoning=reasoning,
        answer=captions[0],
        label={"captions": list(captions)},
    )


DOG = sample("A dog barks at a red car.", number=0)
BELL = sample("Two bells ring while people sing.", number=1)


def test_true_captions_score_perfectly() -> None:
    metrics = AVCAP.score([DOG, BELL], said([DOG.answer, BELL.answer]))
    assert metrics == pytest.approx(
        {"cider": AVCAP.perfect, "bleu_4": 1.0, "chrf": 1.0, "parse_rate": 1.0}
    )
    assert max(metrics["bleu_4"], metrics["chrf"]) <= 1.0


def test_an_unreadable_caption_scores_nothing_and_stays_in_the_mean() -> None:
    for text in ("", "...", f"<answer> {BELL.answer} </answer>"):
        metrics = AVCAP.score([DOG, BELL], said([DOG.answer, text]))
        assert 0.3 < metrics.pop("chrf") < 0.7
        assert metrics == pytest.approx(
            {
                "cider": AVCAP.perfect / 2,
                "bleu_4": math.exp(1 - 13 / 7),  # 7 words for 13: nothing but the penalty on length
                "parse_rate": 0.5,
            }
        )
    metrics = AVCAP.score([DOG, BELL], said(["", ""]))
    assert metrics == {"cider": 0.0, "bleu_4": 0.0, "chrf": 0.0, "parse_rate": 0.0}


def test_what_is_learnt_is_the_caption_alone() -> None:
    # Without tags a reader could not tell reasoning from caption, and it would be scored as a part of it.
    thought = sample("A dog barks.", reasoning="Seen: dog. Heard: dog.")
    assert AVCAP.parse(AVCAP.target(thought)) == "A dog barks."


@pytest.mark.parametrize("text", ["", " \n", "?!", "<obj>", "A dog <mask_0> barks", "a > b"])
def test_a_caption_has_words_and_no_tags(text: str) -> None:
    assert AVCAP.parse(text) is None


def test_case_blanks_and_punctuation_do_not_matter() -> None:
    assert words("A dog's  well-known BARK, at 3 o\u2019clock.") == [
        "a",
        "dog's",
        "well-known",
        "bark",
        "at",
        "3",
        "o\u2019clock",
    ]
    metrics = AVCAP.score([DOG, BELL], said(["a DOG barks, at a  red car", BELL.answer]))
    assert metrics["cider"] == pytest.approx(10)


def test_cider_d_by_hand() -> None:
    # Two samples, so a word of one weighs L = log 2 and "a", which both have, nothing.
    judge = CiderD([["a b c d"], ["a x y z"]])
    assert judge.score("a b c d", 0) == pytest.approx(10)
    # "b" of b, c, d and "a b" of three bigrams; two words too short.
    assert judge.score("a b", 0) == pytest.approx(
        10 * math.exp(-4 / 72) * (2 / math.sqrt(3) + 0 + 0) / 4
    )
    # Counts are clipped at those of the reference: saying it four times does not help.
    assert judge.score("b b b b", 0) == pytest.approx(10 / (4 * math.sqrt(3)) / 4)
    assert judge.score("b", 0) > judge.score("b b b b", 0)
    # Words that no reference has count in the norm, as rare as can be.
    assert judge.score("b q", 0) == pytest.approx(
        10 * math.exp(-4 / 72) * (1 / math.sqrt(2 * 3)) / 4
    )
    for nothing in ("", "a", "x y z", "q"):
        assert judge.score(nothing, 0) == 0.0


def test_cider_d_averages_over_references_and_counts_samples_not_references() -> None:
    alone = CiderD([["a b c d"], ["a x y z"]])
    twice = CiderD([["a b c d", "a b c d"], ["a x y z"]])
    assert twice.score("a b", 0) == pytest.approx(alone.score("a b", 0))
    other = CiderD([["a b c d", "p q r s"], ["a x y z"]])
    assert other.score("a b c d", 0) == pytest.approx(5)


def test_where_cider_d_cannot_be_ten() -> None:
    assert (
        CiderD([["a b c d"]]).score("a b c d", 0) == 0.0
    )  # one sample: nothing is rarer than the rest
    assert CiderD([["b c d"], ["x y z"]]).score("b c d", 0) == pytest.approx(7.5)  # no four words
    assert CiderD([["a b c d"], ["a b c d"]]).score("a b c d", 0) == 0.0


def test_bleu_4_by_hand() -> None:
    assert bleu_4(["a b c d x"], [["a b c d e"]]) == pytest.approx((4 * 3 * 2 / 120) ** 0.25)
    assert bleu_4(["a b c d"], [["a b c d e"]]) == pytest.approx(math.exp(1 - 5 / 4))
    # Nothing is smoothed where no four words in a row are right, or there are not four.
    assert bleu_4(["a b c x y"], [["a b c p q"]]) == 0.0
    assert bleu_4(["a b c"], [["a b c"]]) == 0.0
    # The nearest length counts, and a sample may have fewer references than another.
    references = [["a b c d e", "a b c d"], ["p q r s"]]
    assert bleu_4(["a b c d", "p q r s"], references) == 1.0
    # Counts are of the whole set: 1 + 4 of 5 + 5 single words and so on.
    assert bleu_4(["a v w x y", "p q r s t"], [["a b c d e"], ["p q r s u"]]) == pytest.approx(
        (5 / 10 * 3 / 8 * 2 / 6 * 1 / 4) ** 0.25
    )


def test_chrf_by_hand() -> None:
    # Of the letters 2 of 2 and of 4, of the pairs 1 of 1 and of 3, of the words 0 of 1 and of 1; beta is 2.
    precision, recall = (1 + 1 + 0) / 3, (1 / 2 + 1 / 3 + 0) / 3
    assert chrf(["ab"], [["abab"]]) == pytest.approx(
        5 * precision * recall / (4 * precision + recall)
    )
    assert chrf(["a c"], [["q", "a c"]]) == 1.0  # the best reference
    assert chrf([""], [["a c"]]) == 0.0


def random_captions(dice: random.Random, count: int) -> list[str]:
    vocabulary = "a the red blue dog cat bell rings barks left right and while moves".split()
    return [" ".join(dice.choices(vocabulary, k=dice.randint(1, 14))) for _ in range(count)]


def random_cases() -> Iterator[tuple[list[str], list[list[str]]]]:
    """Captions and references, one and three each; five captions are right and one is empty."""
    dice = random.Random(2)
    for number_of_references in (1, 3):
        captions = random_captions(dice, 60)
        references = [random_captions(dice, number_of_references) for _ in captions]
        captions[:5] = [texts[0] for texts in references[:5]]
        captions[5] = ""
        yield captions, references


def test_scores_are_those_that_the_usual_scorer_gave() -> None:
    # pycocoevalcap 1.2, mean CIDEr-D and BLEU-4. It is a large package, so the test below mostly skips.
    usual = [(1.331091273000075, 0.15310040842053316), (0.8065128752711488, 0.23455433360872244)]
    for (captions, references), (cider, bleu) in zip(random_cases(), usual, strict=True):
        judge = CiderD(references)
        scores = [judge.score(caption, number) for number, caption in enumerate(captions)]
        assert sum(scores) / len(scores) == pytest.approx(cider)
        assert bleu_4(captions, references) == pytest.approx(bleu, abs=1e-6)


def test_scores_equal_the_usual_scorer() -> None:
    reason = "pip install --no-deps pycocoevalcap to compare"
    cider_scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer", reason=reason)
    bleu_scorer = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer", reason=reason)
    for captions, references in random_cases():
        cider, bleu = cider_scorer.CiderScorer(), bleu_scorer.BleuScorer()
        for caption, texts in zip(captions, references, strict=True):
            cider += caption, texts
            bleu += caption, texts
        _, want = cider.compute_score()
        judge = CiderD(references)
        got = [judge.score(caption, number) for number, caption in enumerate(captions)]
        assert got == pytest.approx(want.tolist())
        assert bleu_4(captions, references) == pytest.approx(bleu.compute_score()[0][3], abs=1e-6)


def test_goodness_is_how_near_the_best_reference_is() -> None:
    truth = sample("a b c d", "a c q")
    best, near, far, unreadable = (
        AVCAP.goodness(truth, answer) for answer in said(["a c q", "a c", "c", "<x>"])
    )
    assert best == 1.0 > near > far > unreadable == 0.0


def test_the_constant_is_the_caption_most_like_the_others() -> None:
    dice = random.Random(6)
    train = [sample(text, number=n) for n, text in enumerate(random_captions(dice, 200))]
    test = [sample(text, number=n) for n, text in enumerate(random_captions(dice, 40))]
    assert len(AVCAP.constants(train)) <= CANDIDATES + 1
    found = constant_baseline("avcap", train, test)
    assert found is not None
    judge = CiderD([read_label(s) for s in test])
    every = [sum(judge.score(s.answer, n) for n in range(len(test))) / len(test) for s in train]
    assert found[1]["cider"] >= 0.9 * max(every)
    assert constant_baseline("avcap", [], test) is None


def test_the_commonest_caption_is_a_constant() -> None:
    # Everybody says it, so it weighs nothing in the train split; it need not be so in the test split.
    common = [sample("nothing moves here at all", number=n) for n in range(3)]
    texts = [answer.text for answer in AVCAP.constants(common)]
    assert texts == ["nothing moves here at all"]


def test_consensus_is_the_mean_cosine() -> None:
    captions = ["a b c d", "a b c e", "p q r s"]
    likeness = consensus(captions)
    judge = CiderD([[caption] for caption in captions])
    # Of one length and without repeated words: there clipping and the penalty on lengths change nothing.
    for caption in captions:
        want = sum(judge.score(caption, number) for number in range(3)) / 30
        assert likeness[caption] == pytest.approx(want)
    assert min(likeness, key=lambda caption: likeness[caption]) == "p q r s"


@pytest.mark.parametrize(
    "label", [{}, {"captions": []}, {"captions": ["?"]}, {"captions": "a b"}, {"captions": [1]}]
)
def test_a_label_without_captions_is_named(label: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="'s0'"):
        AVCAP.score([DOG.model_copy(update={"label": label})], said([""]))
