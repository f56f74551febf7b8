"""Captions: each sentence is true of the transcript, and each object has one."""

import re

from crab.synth import CLASS_NAMES, make_scene, samples_of, transcript

SENTENCE = re.compile(
    rf"A (?P<name>{'|'.join(CLASS_NAMES)}) (?:moves (?:in|on) the (?P<place>left|middle|right)"
    r" (?P<sound>in silence|and sounds|and sounds when out of view)|(?P<unseen>sounds out of view))\."
)


def test_captions_are_true_and_complete() -> None:
    kinds = set()
    for index in range(150):
        scene = make_scene(8, index)
        [sample] = [sample for sample in samples_of(scene) if sample.task == "avcap"]
        assert sample.label == {"captions": [sample.answer]}
        told = [SENTENCE.fullmatch(part) for part in re.findall(r"A [^.]*\.", sample.answer)]
        seen: dict[str, set[int]] = {}
        heard: dict[str, set[int]] = {}
        places = {}
        for second, words in enumerate(transcript(scene)["seconds"]):
            for item in words["visible"]:
                seen.setdefault(item["name"], set()).add(second)
                places[item["name"]] = item["position"]
            for name in words["sounding"]:
                heard.setdefault(name, set()).add(second)
        names = []
        for sentence in told:
            assert sentence is not None, sample.answer
            name = sentence["name"]
            names.append(name)
            kinds.add(kind := sentence["sound"] or sentence["unseen"])
            sights, sounds = seen.get(name, set()), heard.get(name, set())
            assert sentence["place"] == places.get(name)
            assert kind == (
                "sounds out of view"
                if not sights
                else "in silence"
                if not sounds
                else "and sounds"
                if sights & sounds
                else "and sounds when out of view"
            )
        assert " ".join(match[0] for match in told if match) == sample.answer
        assert sorted(names) == sorted({*seen, *heard})
        assert len(sample.answer.split()) <= 50
    assert len(kinds) == 4
