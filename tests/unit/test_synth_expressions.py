"""Referring expressions: judged again from the transcript, by other code than the one that wrote them."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from crab.samples import Sample
from crab.synth import CLASS_NAMES, make_scene, samples_of, transcript
from crab.synth.expressions import UNSEEN_CLASSES
from crab.synth.scene import COLOURS, SHAPES, Scene
from crab.tasks.mask_answer import MaskItem, parse_mask_answer

SCENES = [make_scene(3, index) for index in range(400)]
SAMPLES = [
    (sample, scene) for scene in SCENES for sample in samples_of(scene) if sample.task == "ref-avs"
]
FORMS = {
    "class": rf"the ({'|'.join(CLASS_NAMES)})",
    "colour": rf"the ({'|'.join(COLOURS)}) object",
    "shape": rf"the ({'|'.join(SHAPES)})",
    "place": r"the object (on the left|in the middle|on the right)",
    "first": r"the object that sounds first",
    "last": r"the object that starts to sound last",
    "silent": r"the object that never sounds",
    "class first": rf"the ({'|'.join(CLASS_NAMES)}) that sounds first",
    "class silent": rf"the ({'|'.join(CLASS_NAMES)}) that never sounds",
}


@dataclass
class Thing:
    seen: set[int] = field(default_factory=set)
    heard: set[int] = field(default_factory=set)
    place: str = ""


def things(scene: Scene) -> dict[str, Thing]:
    found: defaultdict[str, Thing] = defaultdict(Thing)
    for second, words in enumerate(transcript(scene)["seconds"]):
        for item in words["visible"]:
            found[item["name"]].seen.add(second)
            found[item["name"]].place = item["position"]
        for name in words["sounding"]:
            found[name].heard.add(second)
    return found


def form_of(text: str) -> tuple[str, str]:
    [(form, match)] = [
        (form, match) for form, rule in FORMS.items() if (match := re.fullmatch(rule, text))
    ]
    return form, "".join(match.groups())


def fitting(text: str, scene: Scene) -> set[str]:
    """Names of all objects that the expression fits."""
    form, word = form_of(text)
    found = things(scene)
    begins = {name: min(thing.heard) for name, thing in found.items() if thing.heard}
    firsts = {name for name in begins if begins[name] == min(begins.values())}
    lasts = {name for name in begins if begins[name] == max(begins.values())}
    silent = set(found) - set(begins)
    match form:
        case "class":
            return set(found) & {word}
        case "colour" | "shape":
            return {name for name in found if word in name.split()}
        case "place":
            return {name for name, thing in found.items() if thing.place == word.split()[-1]}
        case "first":
            return firsts
        case "last":
            return lasts
        case "silent":
            return silent
        case "class first":
            assert len(firsts) == 1 or word not in firsts
            return firsts & {word}
        case "class silent":
            assert word in found
            return silent & {word}
    raise AssertionError(text)


def meant(sample: Sample) -> set[str]:
    """Names in the masks; checked to be the same in all ten frames and in the answer."""
    assert [mask.frame for mask in sample.masks] == list(range(10))
    [values] = {mask.values for mask in sample.masks}
    names = tuple(CLASS_NAMES[value - 1] for value in values or ())
    whole = (MaskItem(start_s=0, end_s=10, names=names),) if names else ()
    assert parse_mask_answer(sample.answer) == whole
    return set(names)


def test_every_expression_fits_what_is_masked_and_nothing_else() -> None:
    for sample, scene in SAMPLES:
        text = sample.label["expression"]
        assert text in sample.instruction
        assert fitting(text, scene) == meant(sample), (sample.id, text)
        assert len(meant(sample)) == (sample.label["subset"] != "null")


def test_what_is_meant_is_in_view_for_five_seconds() -> None:
    for sample, scene in SAMPLES:
        for name in meant(sample):
            assert len(things(scene)[name].seen) >= 5


def test_unseen_classes_are_meant_in_the_test_split_alone() -> None:
    counts = Counter((sample.split, sample.label["subset"]) for sample, _ in SAMPLES)
    assert counts["train", "unseen"] == 0
    assert counts["test", "unseen"] > 0.1 * sum(counts["test", s] for s in ("seen", "unseen"))
    for sample, _ in SAMPLES:
        unseen = bool(meant(sample) & set(UNSEEN_CLASSES))
        assert unseen == (sample.label["subset"] == "unseen")
        if sample.label["subset"] == "null":
            assert not any(name in sample.label["expression"] for name in UNSEEN_CLASSES)
    # Train scenes do show them: only expressions leave them out.
    assert any(actor.name in UNSEEN_CLASSES for scene in SCENES for actor in scene.seen)


def test_a_sixth_fits_nothing_and_its_form_does_not_tell() -> None:
    for split in ("train", "test"):
        some = [sample for sample, _ in SAMPLES if sample.split == split]
        null = sum(sample.label["subset"] == "null" for sample in some)
        assert 0.14 < null / len(some) < 0.2
    forms = Counter(
        (form_of(sample.label["expression"])[0], sample.label["subset"] == "null")
        for sample, _ in SAMPLES
    )
    assert {form for form, _ in forms} == set(FORMS)
    # Something is always heard in these scenes, so there is always a first and a last sound.
    for form in set(FORMS) - {"first", "last"}:
        assert forms[form, False] > 10
        assert forms[form, True] > 3, form


def test_the_two_of_a_clip_are_of_different_forms() -> None:
    forms = Counter((s.clip, form_of(s.label["expression"])[0]) for s, _ in SAMPLES)
    assert set(forms.values()) == {1}


def test_reasoning_ends_in_what_is_meant_and_where() -> None:
    for sample, scene in SAMPLES:
        if names := meant(sample):
            [name] = names
            place = things(scene)[name].place
            end = f"That is the {name} {'in' if place == 'middle' else 'on'} the {place}."
        else:
            end = "Nothing fits."
        assert sample.reasoning.endswith(end)
