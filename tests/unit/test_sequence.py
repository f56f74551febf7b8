"""Sequences: their order, where they stop, and what a second start costs."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.run import run_spec
from jobs.spec import SequenceSpec, SpecError, parse_spec


def sequence(folder: Path, *steps: dict[str, Any]) -> SequenceSpec:
    spec = parse_spec(
        {
            "job": "sequence",
            "name": "all",
            "runs": str(folder / "runs"),
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "steps": list(steps),
        }
    )
    assert isinstance(spec, SequenceSpec)
    return spec


def synth(folder: Path, name: str, clips: int, seed: int = 3) -> dict[str, Any]:
    return {
        "job": "synth",
        "name": name,
        "out": str(folder / "shapes"),
        "clips": clips,
        "seed": seed,
    }


def test_steps_come_in_order_and_stop_at_the_first_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        synth(tmp_path, "first", clips=1),
        synth(tmp_path, "other-seed", clips=1, seed=4),  # refused: the folder has clips of seed 3
        synth(tmp_path, "never", clips=1),
    ]
    with pytest.raises(SpecError, match=r"step 2 of 3, synth 'other-seed': .*seed=3 but 4"):
        run_spec(sequence(tmp_path, *steps))
    assert (tmp_path / "runs" / "first" / "result.json").exists()
    assert not (tmp_path / "runs" / "never").exists()
    assert not (tmp_path / "runs" / "all").exists()
    said = capsys.readouterr().err
    assert said.index("step 1 of 3") < said.index("step 2 of 3")
    assert "step 3 of 3" not in said

    # Mended and started again: what was done is left as it is.
    (clip,) = (tmp_path / "shapes" / "clips").glob("*.mp4")
    written = clip.stat().st_mtime_ns
    steps[1] = synth(tmp_path, "more", clips=2)
    result = run_spec(sequence(tmp_path, *steps))
    assert clip.stat().st_mtime_ns == written
    assert [step["name"] for step in result["steps"]] == ["first", "more", "never"]
    assert result["seconds"].keys() == {"first", "more", "never"}
    assert json.loads((tmp_path / "runs" / "all" / "result.json").read_text()) == result


def test_steps_take_the_place_of_runs_from_the_sequence(tmp_path: Path) -> None:
    own = synth(tmp_path, "own", clips=1) | {"runs": str(tmp_path / "elsewhere")}
    spec = sequence(tmp_path, synth(tmp_path, "common", clips=1), own)
    assert [step.runs for step in spec.steps] == [
        str(tmp_path / "runs"),
        str(tmp_path / "elsewhere"),
    ]
    assert {step.tracking.uri for step in spec.steps} == {spec.tracking.uri}


def test_a_sequence_needs_a_name_for_each_step_and_at_least_one(tmp_path: Path) -> None:
    one = synth(tmp_path, "one", clips=1)
    with pytest.raises(SpecError, match="used twice: one"):
        sequence(tmp_path, one, one)
    with pytest.raises(SpecError, match="used twice: all"):
        sequence(tmp_path, one | {"name": "all"})
    with pytest.raises(SpecError, match="at least 1 item"):
        sequence(tmp_path)
    with pytest.raises(SpecError, match=r"steps\.inner\.job: is 'sequence'; expected one of synth"):
        sequence(tmp_path, {"job": "sequence", "name": "inner", "steps": [one]})
