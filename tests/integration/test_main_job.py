"""The main job by the command line, small, over all nine tasks: clips, features, adapter, scores, a report, an answer.

And all of it a second time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SPECS = ROOT / "jobs" / "specs"
TASKS = {"ave", "avvp", "arig", "s4", "ms3", "avss", "ref-avs", "avqa", "avcap"}
pytestmark = pytest.mark.ray

# The shipped sequence, so small that it says nothing about the model.
SMALL = [
    "steps.synth-nine.clips=20",
    "steps.train-nine.optimisation.steps=4",
    "steps.train-nine.optimisation.batch_size=12",
    "steps.train-nine.workers.checkpoint_every=2",
    "steps.train-nine.parse_rate_samples=1",
    "steps.evaluate-nine.samples_per_task=4",
    "steps.evaluate-nine.max_new_tokens=40",
    "steps.report-nine.examples=2",
]


def crab(folder: Path, *arguments: str) -> tuple[Any, str]:
    """Runs the command in `folder` with --json and returns what it printed: (result, what people see)."""
    done = run(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    return subprocess.run(
        [sys.executable, "-c", "from jobs.cli import main; main()", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def nine_tasks(folder: Path) -> tuple[Any, str]:
    sets = [part for change in SMALL for part in ("--set", change)]
    return crab(folder, "run", str(SPECS / "nine-tasks-tiny.yaml"), *sets)


def result_of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "work/runs" / name / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything was done once."""
    path = tmp_path_factory.mktemp("main-job")
    nine_tasks(path)
    return path


def test_second_run_makes_encodes_trains_and_asks_nothing(folder: Path) -> None:
    steps = ("train-nine", "evaluate-nine")
    before = [result_of(folder, name) for name in steps]
    result, said = nine_tasks(folder)
    assert [result_of(folder, name) for name in steps] == before
    preprocess = next(step for step in result["steps"] if step["job"] == "preprocess")
    assert (preprocess["hits"], preprocess["encoded"], preprocess["decoded_files"]) == (40, 0, 0)
    assert preprocess["media_bytes_read"] == 0
    assert "nothing was decoded or encoded" in said
    assert "train-nine: trained already, nothing to do" in said
    assert "evaluate-nine: evaluated already, nothing to do" in said
    assert "step 5 of 5, report 'report-nine'" in said


def test_all_nine_tasks_are_trained_with_masks(folder: Path) -> None:
    result = result_of(folder, "train-nine")
    steps = (Path(result["adapter"]).parent / "steps.jsonl").read_text().splitlines()
    named = {name for step in steps for name in json.loads(step)}
    assert {f"loss/{task}" for task in TASKS} <= named
    assert {f"mask_loss/{task}" for task in ("s4", "ms3", "avss", "ref-avs")} <= named
    assert not {"mask_loss/ave", "mask_loss/avcap"} & named
    rates = {name: v for name, v in result["metrics"].items() if name.startswith("parse_rate/")}
    assert {"parse_rate/avqa", "parse_rate/ref-avs"} <= rates.keys()
    assert all(0 <= rate <= 1 for rate in rates.values())


def test_held_out_clips_are_answered_and_scored(folder: Path) -> None:
    result = result_of(folder, "evaluate-nine")
    assert result["scores"].keys() <= TASKS
    assert {"avvp", "avss", "ref-avs", "avqa", "avcap"} <= result["scores"].keys()
    for task, metrics in result["scores"].items():
        assert 0 <= metrics["parse_rate"] <= 1
        assert metrics["missing"] == 0
        assert metrics["num_samples"] <= 4
        assert "metrics" in result["constants"][task]
    assert result["left_out"] == {}
    lines = (folder / "work/runs/evaluate-nine/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == sum(m["num_samples"] for m in result["scores"].values())
    for row in rows:
        assert row["sample"]["split"] == "test"
        assert Path(row["sample"]["video"]).is_absolute()
        assert 0 <= row["goodness"] <= 1
        if row["masks"] is not None:
            with np.load(folder / "work/runs/evaluate-nine" / row["masks"]) as masks:
                assert masks["values"].shape[1:] == (224, 224)
                assert len(masks["frames"]) == len(masks["values"])


def test_a_clip_that_is_gone_counts_as_wrong_and_is_named(folder: Path) -> None:
    """And data without train samples is scored all the same, beside no constant."""
    lines = (folder / "work/nine/samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test"]
    clips = list(dict.fromkeys(row["video"] for row in rows))[:2]
    rows = [row for row in rows if row["video"] in clips and row["task"] in ("avqa", "avss")]
    for row in rows:
        if row["video"] == clips[1]:
            row["video"] = "clips/gone.mp4"
    data = folder / "work/nine/gone.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data=[{{name: gone, samples: {data}}}]"
    crab(
        folder,
        *("run", str(SPECS / "preprocess-shapes.yaml"), "--set", source, "--set", "name=p-gone"),
    )
    changes = [source, "name=gone", "features.manifest=p-gone", "adapter=train-nine", "workers=1"]
    sets = [part for change in [*changes, "max_new_tokens=40"] for part in ("--set", change)]
    result, said = crab(folder, "run", str(SPECS / "evaluate-shapes.yaml"), *sets)
    lost = [row["id"] for row in rows if row["video"] == "clips/gone.mp4"]
    assert result["left_out"] == {"not_found": lost}
    assert lost[0] in said
    for task in ("avqa", "avss"):
        of_task = [row for row in rows if row["task"] == task]
        assert result["scores"][task]["num_samples"] == len(of_task)
        assert result["scores"][task]["missing"] == sum(row["id"] in lost for row in of_task)
    assert result["constants"]["avqa"] is None


def test_an_answer_about_any_clip_and_a_reason_for_a_broken_one(folder: Path) -> None:
    broken = folder / "broken.mp4"
    broken.write_bytes(b"this is no film")
    (clip,) = folder.glob("work/nine/clips/*000004.mp4")
    answers, _ = crab(
        folder,
        *("predict", "--adapter", "train-nine", "--task", "avqa", "--out", "page"),
        *("--question", "How many objects are heard in the clip?", str(clip), str(broken)),
    )
    assert answers[0]["text"]
    assert answers[0]["without"] == []
    assert "not_media" in answers[1]["problem"]
    assert (folder / "page" / "index.html").is_file()


def test_the_report_is_there(folder: Path) -> None:
    page = folder / "work/runs/evaluate-nine/report/index.html"
    assert result_of(folder, "report-nine")["page"] == str(page)
    text = page.read_text()
    assert all(task in text for task in ("ref-avs", "avcap", "avqa"))


def test_the_exported_adapter_is_plain_peft_and_says_where_it_comes_from(folder: Path) -> None:
    result = result_of(folder, "train-nine")
    adapter = Path(result["adapter"])
    lineage = json.loads((adapter / "crab.json").read_text())["lineage"]
    assert lineage["manifest"] == result["manifest"]
    assert lineage["step"] == 4
    assert len(lineage["base_model"]) == 64
    config = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_heads"]) == ("INTERACTION_LORA", 3)


def test_lineage_leads_from_the_adapter_to_its_clips_and_from_a_clip_back(folder: Path) -> None:
    result = result_of(folder, "train-nine")
    adapter, manifest = result["adapter"], result["manifest"]
    found, _ = crab(folder, "cache", "lineage", adapter)
    assert found["is_a"] == "adapter"
    assert found["manifests"][manifest]["clips"] == 20
    kinds = {job["kind"] for job in found["jobs"]}
    assert {"preprocess", "train", "evaluate"} <= kinds
    (clip,) = folder.glob("work/nine/clips/*000004.mp4")
    back, _ = crab(folder, "cache", "lineage", str(clip))
    assert back["is_a"] == "clip"
    assert manifest in back["manifests"]
    folders = {job["adapter_folder"] for job in back["jobs"] if job["kind"] == "train"}
    assert adapter in folders


def test_answers_that_a_task_cannot_read_are_refused_before_training(folder: Path) -> None:
    lines = (folder / "work/nine/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if row["task"] == "avqa":
            row["answer"] = "two"
    (folder / "work/nine/bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "data=[{name: nine, samples: work/nine/bad.jsonl}]"
    features = "features.manifest=preprocess-nine"
    done = run(
        folder,
        *("run", str(SPECS / "train-shapes.yaml"), "--set", data, "--set", features),
    )
    assert done.returncode == 2
    assert "'two'" in done.stderr
    assert "crab/tasks/avqa.py" in done.stderr


def test_no_answer_at_all_is_a_failure(folder: Path) -> None:
    arguments = ("predict", "--adapter", "train-nine", "--task", "ave", "nothing.mp4")
    for more in ((), ("--json",)):
        done = run(folder, *arguments, *more)
        assert done.returncode == 1
        assert "not_found" in done.stdout
    near = run(folder, "predict", "--adapter", "train-nin", "--task", "ave", "nothing.mp4")
    assert near.returncode == 2
    assert "did you mean 'train-nine'" in near.stderr
