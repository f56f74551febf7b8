"""Samples: every answer is recomputed from the transcript, by other code than the one that asked."""

import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from crab.samples import Sample
from crab.synth import CLASS_NAMES, make_scene, samples_of, transcript
from crab.tasks import TASKS, Answer

NUMBERS = ["zero", "one", "two", "three", "four"]
SCENES = [make_scene(2, index) for index in range(270)]
SAMPLES = [(sample, transcript(scene)) for scene in SCENES for sample in samples_of(scene)]
QUESTIONS = [(sample, told) for sample, told in SAMPLES if sample.task == "avqa"]


def seconds_of(
    told: dict[str, Any],
) -> tuple[dict[str, set[int]], dict[str, set[int]], dict[str, str]]:
    """class -> seconds seen, class -> seconds heard, class -> position."""
    seen: defaultdict[str, set[int]] = defaultdict(set)
    heard: defaultdict[str, set[int]] = defaultdict(set)
    places: dict[str, str] = {}
    for second, words in enumerate(told["seconds"]):
        for item in words["visible"]:
            seen[item["name"]].add(second)
            places[item["name"]] = item["position"]
        for name in words["sounding"]:
            heard[name].add(second)
    return seen, heard, places


def recomputed(question: str, told: dict[str, Any]) -> str:
    seen, heard, places = seconds_of(told)
    names = re.findall("|".join(CLASS_NAMES), question)
    first = min(heard, key=lambda name: min(heard[name])) if heard else ""
    match question.split()[:3], names:
        case ["How", "many", "objects"], _ if "at second" in question:
            second = int(question.rstrip("?").split()[-1])
            return NUMBERS[
                sum(second in heard[name] for name in list(seen) if second in seen[name])
            ]
        case ["How", "many", "objects"], _ if "while" in question:
            return NUMBERS[sum(bool(seen[name] & heard[name]) for name in list(seen))]
        case ["How", "many", "objects"], _:
            return NUMBERS[len(heard if "heard" in question else seen)]
        case ["Which", "object", "is"], _:
            return first
        case ["Where", "is", "the"], [name]:
            return places[name]
        case ["Where", "is", "the"], []:
            return places[first]
        case ["Is", "the", _], [name] if "while" in question:
            return "yes" if seen[name] & heard[name] else "no"
        case ["Is", "the", _], [name]:
            more, less = (seen, heard) if "seen for longer" in question else (heard, seen)
            return "yes" if len(more[name]) > len(less[name]) else "no"
        case ["Is", "the", _], [name, other]:
            return "yes" if len(heard[name]) > len(heard[other]) else "no"
    raise AssertionError(question)


def test_answers_to_questions_follow_from_the_transcript() -> None:
    for sample, told in QUESTIONS:
        assert recomputed(sample.label["question"], told) == sample.label["answer"]
        assert sample.label["question"] in sample.instruction


def test_ave_and_avvp_labels_follow_from_the_transcript() -> None:
    for sample, told in SAMPLES:
        seen, heard, _ = seconds_of(told)
        if sample.task == "ave":
            both = {(name, second) for name in list(seen) for second in seen[name] & heard[name]}
            label = sample.label
            assert both == {
                (label["event"], second) for second in range(label["start_s"], label["end_s"])
            }
        if sample.task == "avvp":
            for stream, truth in (("visual", seen), ("audio", heard)):
                labelled: defaultdict[str, set[int]] = defaultdict(set)
                for name, start, end in sample.label[stream]:
                    assert start - 1 not in labelled[name]
                    labelled[name] |= set(range(start, end))
                assert labelled == {name: times for name, times in truth.items() if times}


@pytest.mark.parametrize("task", ["ave", "avvp", "arig", "avqa"])
def test_answers_read_back_as_the_label_and_score_one(task: str) -> None:
    judge = TASKS[task]
    samples = [sample for sample, _ in SAMPLES if sample.task == task]
    scores = judge.score(samples, [Answer(text=judge.target(sample)) for sample in samples])
    assert scores[judge.headline] == judge.perfect


def test_every_task_has_samples_and_every_target_parses() -> None:
    assert {sample.task for sample, _ in SAMPLES} == set(TASKS)
    for sample, _ in SAMPLES:
        task = TASKS[sample.task]
        assert task.parse(task.target(sample)) is not None, sample.id


def test_reasoning_is_short_prose_without_tags() -> None:
    longest = {"ms3": 110, "avss": 110, "ave": 45, "s4": 45}
    for sample, _ in SAMPLES:
        words = len(sample.reasoning.split())
        assert words == 0 if sample.task == "avcap" else 3 <= words <= longest.get(sample.task, 32)
        assert "<" not in sample.reasoning


def test_one_sentence_a_task_asks() -> None:
    for task in ("ave", "avvp", "s4", "ms3", "avss", "avcap"):
        assert len({sample.instruction for sample, _ in SAMPLES if sample.task == task}) == 1
    assert len({re.sub(r"\d", "", s.instruction) for s, _ in SAMPLES if s.task == "arig"}) == 1


def test_all_nine_types_are_asked_about_equally_and_differ_within_a_clip() -> None:
    types = Counter(tuple(sample.label["type"]) for sample, _ in QUESTIONS)
    assert len(types) == 9
    assert max(types.values()) < 3 * min(types.values())
    by_clip = Counter((sample.clip, tuple(sample.label["type"])) for sample, _ in QUESTIONS)
    assert set(by_clip.values()) == {1}


def test_no_constant_answer_does_well() -> None:
    answers = Counter(sample.label["answer"] for sample, _ in QUESTIONS)
    assert answers.most_common(1)[0][1] / len(QUESTIONS) < 0.25
    for kind in {tuple(sample.label["type"]) for sample, _ in QUESTIONS}:
        given = Counter(s.label["answer"] for s, _ in QUESTIONS if tuple(s.label["type"]) == kind)
        assert given.most_common(1)[0][1] / given.total() < 0.68, kind


def test_a_clip_is_in_one_split_and_a_fifth_is_for_testing() -> None:
    splits: defaultdict[str, set[str]] = defaultdict(set)
    for sample, _ in SAMPLES:
        splits[sample.clip].add(sample.split)
    assert all(len(names) == 1 for names in splits.values())
    assert sum(names == {"test"} for names in splits.values()) == len(SCENES) // 5


@pytest.mark.parametrize("count", [0, 1, 9])
def test_the_number_of_questions_can_be_chosen(count: int) -> None:
    samples: list[Sample] = samples_of(SCENES[0], questions_per_clip=count)
    assert sum(sample.task == "avqa" for sample in samples) <= count
    assert len({sample.id for sample in samples}) == len(samples)


def test_samples_are_few_and_the_same_each_time() -> None:
    most = {"avqa": 4, "ref-avs": 2}
    for (clip, task), count in Counter((s.clip, s.task) for s, _ in SAMPLES).items():
        assert count <= most.get(task, 1), clip
    assert samples_of(SCENES[3]) == samples_of(SCENES[3])
