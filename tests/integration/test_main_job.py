"""The main job by the command line, small: clips, features, adapter, scores, an answer; and all of it a second time."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ray


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything was done once."""
    path = tmp_path_factory.mktemp("main-job")
    crab(path, "synth", "work/shapes", "--clips", "10", "--seed", "3")
    spec = ROOT / "jobs" / "specs"
    crab(path, "run", str(spec / "preprocess-shapes.yaml"))
    small = ["--set", "optimisation.steps=4", "--set", "workers.checkpoint_every=2"]
    crab(path, "run", str(spec / "train-shapes.yaml"), *small)
    return path


def test_second_run_decodes_encodes_and_trains_nothing(folder: Path) -> None:
    specs = ROOT / "jobs" / "specs"
    result, said = crab(folder, "run", str(specs / "preprocess-shapes.yaml"))
    assert (result["hits"], result["encoded"], result["decoded_files"]) == (20, 0, 0)
    assert result["media_bytes_read"] == 0
    assert "nothing was decoded or encoded" in said
    before = json.loads((folder / "work/runs/train-shapes/result.json").read_text())
    small = ["--set", "optimisation.steps=4", "--set", "workers.checkpoint_every=2"]
    again, said = crab(folder, "run", str(specs / "train-shapes.yaml"), *small)
    assert again == before
    assert "nothing to do" in said


def test_held_out_clips_are_answered_and_scored(folder: Path) -> None:
    result, _ = crab(folder, "run", str(ROOT / "jobs" / "specs" / "evaluate-shapes.yaml"))
    assert {"avvp", "avqa"} <= set(result["scores"]) <= {"ave", "avvp", "avqa"}
    for task, metrics in result["scores"].items():
        assert 0 <= metrics["parse_rate"] <= 1
        assert metrics["missing"] == 0
        assert result["constants"][task]["answer"]
    lines = (folder / "work/runs/evaluate-shapes/predictions.jsonl").read_text().splitlines()
    assert len(lines) == sum(m["num_samples"] for m in result["scores"].values())


def test_an_answer_about_any_clip_and_a_reason_for_a_broken_one(folder: Path) -> None:
    broken = folder / "broken.mp4"
    broken.write_bytes(b"this is no film")
    (clip,) = folder.glob("work/shapes/clips/*000004.mp4")
    answers, _ = crab(
        folder,
        *("predict", "--adapter", "train-shapes", "--task", "avqa"),
        *("--question", "How many objects are heard in the clip?", str(clip), str(broken)),
    )
    assert answers[0]["text"]
    assert answers[0]["without"] == []
    assert "not_media" in answers[1]["problem"]


def test_the_exported_adapter_is_plain_peft_and_says_where_it_comes_from(folder: Path) -> None:
    result = json.loads((folder / "work/runs/train-shapes/result.json").read_text())
    adapter = Path(result["adapter"])
    lineage = json.loads((adapter / "crab.json").read_text())["lineage"]
    assert lineage["manifest"] == result["manifest"]
    assert lineage["step"] == 4
    assert len(lineage["base_model"]) == 64
    config = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_heads"]) == ("INTERACTION_LORA", 3)


def test_answers_that_a_task_cannot_read_are_refused_before_training(folder: Path) -> None:
    good = (folder / "work/shapes/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in good]
    for row in rows:
        if row["task"] == "avqa":
            row["answer"] = "two"
    (folder / "work/shapes/bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "data=[{name: shapes, samples: work/shapes/bad.jsonl}]"
    done = run(folder, "run", str(ROOT / "jobs/specs/train-shapes.yaml"), "--set", data)
    assert done.returncode == 2
    assert "'two'" in done.stderr
    assert "crab/tasks/avqa.py" in done.stderr


def test_no_answer_at_all_is_a_failure(folder: Path) -> None:
    arguments = ("predict", "--adapter", "train-shapes", "--task", "ave", "nothing.mp4")
    for more in ((), ("--json",)):
        done = run(folder, *arguments, *more)
        assert done.returncode == 1
        assert "not_found" in done.stdout
    near = run(folder, "predict", "--adapter", "train-shape", "--task", "ave", "nothing.mp4")
    assert near.returncode == 2
    assert "did you mean 'train-shapes'" in near.stderr
