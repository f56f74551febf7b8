"""Which samples can be learnt from or scored, and what is said of the others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crab.samples import MaskRef, Sample, write_samples
from crab_platform.catalog import Manifest, ManifestRow, build_manifest
from crab_platform.packs import Entry
from jobs.chosen import choose_items
from jobs.data import Dataset, load_dataset, samples_digest
from jobs.evaluate import choose_asked
from jobs.features import usable
from jobs.spec import DataSource, SpecError


def sample(name: str, task: str = "avqa", **changes: Any) -> Sample:
    values: dict[str, Any] = {
        "id": f"{task}-{name}",
        "task": task,
        "split": "test",
        "clip": name,
        "video": f"{name}.mp4",
        "instruction": "What is it?",
        "answer": "<answer> red </answer>",
        "label": {"answer": "red"},
    }
    return Sample.model_validate(values | changes)


@dataclass
class Data:
    dataset: Dataset
    manifest: Manifest


def data(folder: Path, samples: list[Sample], **reasons: str) -> Data:
    """A data set whose clips are all encoded, but those named in `reasons`."""
    dataset = load_dataset(
        DataSource(name="d", samples=str(write_samples(folder / "samples.jsonl", samples))), {}
    )
    rows = []
    for source in dataset.sources:
        reason = reasons.get(Path(source.name).stem)
        for stream in source.streams:
            entry = Entry(key="k", pack="p", offset=0, length=1, blake3="b", tensors=())
            rows.append(
                ManifestRow(source=source.name, stream=stream, status="set_aside", reason=reason)
                if reason
                else ManifestRow(source=source.name, stream=stream, status="ready", entry=entry)
            )
    return Data(dataset=dataset, manifest=build_manifest(rows))


def test_samples_without_a_label_are_set_apart_from_those_without_features(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    masked = {"task": "s4", "masks": (MaskRef(frame=0, file="there.png"),)}
    lost = {"task": "s4", "masks": (MaskRef(frame=0, file="there.png"), MaskRef(frame=1, file="x"))}
    given = data(
        tmp_path,
        [
            sample("good"),
            sample("weak", "avvp", label={"weak": ["dog"]}),
            sample("masked", **masked),
            sample("lost", **lost),
            sample("broken"),
            sample("gone"),
            sample("silent"),
            sample("other", split="train"),
        ],
        broken="corrupt",
        gone="not_found",
    )
    found = usable([given.dataset], given.manifest, ["avqa", "avvp", "s4"], "test")
    assert [item.sample.clip for item in found.items] == ["good", "masked", "silent"]
    assert [s.clip for s in found.with_label] == ["good", "masked", "broken", "gone", "silent"]
    assert found.no_label == {"weak_label": ["avvp-weak"], "mask_not_found": ["s4-lost"]}
    assert found.no_features == {"corrupt": ["avqa-broken"], "not_found": ["avqa-gone"]}
    assert found.left_out == {name: 1 for name in found.no_label | found.no_features}


def test_an_empty_choice_says_why(tmp_path: Path) -> None:
    given = data(tmp_path, [sample("gone")], gone="not_found")
    with pytest.raises(SpecError, match="not_found"):
        usable([given.dataset], given.manifest, ["avqa"], "test")
    with pytest.raises(SpecError, match="no such sample"):
        usable([given.dataset], given.manifest, ["avqa"], "train")
    # What the manifest was never told of is a mistake, not a clip that is missing.
    other = data(tmp_path, [sample("good")])
    with pytest.raises(ValueError, match=r"good\.mp4"):
        usable([other.dataset], given.manifest, ["avqa"], "test")


def test_an_evaluation_asks_the_first_of_each_task_and_names_what_it_cannot_ask(
    tmp_path: Path,
) -> None:
    samples = [sample(str(number), task) for task in ("avqa", "ave") for number in range(3)]
    given = data(tmp_path, [*samples, sample("weak", label={"weak": []})], **{"1": "corrupt"})
    found = usable([given.dataset], given.manifest, ["avqa", "ave"], "test")
    asked, left_out = choose_asked(found, 2)
    assert [s.id for s in asked] == ["avqa-0", "avqa-1", "ave-0", "ave-1"]
    assert left_out == {"corrupt": ["avqa-1", "ave-1"], "weak_label": ["avqa-weak"]}
    assert len(choose_asked(found, None)[0]) == 6


def test_a_few_samples_of_each_task_are_kept_from_training(tmp_path: Path) -> None:
    train = [sample(f"t{n}", task, split="train") for task in ("avqa", "ave") for n in range(20)]
    few = [sample(f"t{n}", "avcap", split="train") for n in range(9)]
    given = data(tmp_path, train + few)
    tasks = ["avqa", "ave", "avcap"]
    chosen = choose_items([given.dataset], given.manifest, tasks, 5)
    kept = [item.sample.id for item in chosen.probes]
    assert kept == ["avqa-t18", "avqa-t19", "ave-t18", "ave-t19"]  # a tenth at most
    assert {i.sample.id for i in chosen.items} == {s.id for s in train + few} - set(kept)
    assert choose_items([given.dataset], given.manifest, tasks, 0).probes == []

    val = [sample(f"v{n}", split="val") for n in range(3)]
    given = data(tmp_path, train + val)
    chosen = choose_items([given.dataset], given.manifest, tasks, 2)
    kept = [item.sample.id for item in chosen.probes]
    assert kept == ["avqa-v0", "avqa-v1", "ave-t18", "ave-t19"]
    assert sum(item.sample.task == "avqa" for item in chosen.items) == 20


def test_another_label_or_question_is_another_data_set() -> None:
    assert samples_digest([sample("a")]) == samples_digest([sample("a")])
    changed = [sample("a", label={"answer": "blue"}), sample("a", instruction="Which?")]
    assert len({samples_digest([one]) for one in [sample("a"), *changed]}) == 3
    assert samples_digest([sample("a"), sample("b")]) != samples_digest([sample("b"), sample("a")])
