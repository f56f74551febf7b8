"""What is remembered of an encoder is what loading it says, and no change of it is missed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from support.tiny_encoders import hearing_folder, vision_folder

from crab.encoders.config import EncoderConfig
from crab.encoders.identity import CACHE_DIR_VARIABLE, identify
from crab.encoders.load import load_encoder
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec

CHILD = """
import json, sys
from crab.encoders.config import EncoderConfig
from crab.encoders.identity import identify
found = identify(EncoderConfig.model_validate_json(sys.argv[1]))
print(json.dumps([found.record, "torch" in sys.modules]))
"""


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "remembered"))
    return tmp_path / "remembered"


def encoder(kind: str, folder: Path, seed: int = 0) -> EncoderConfig:
    if kind == "beats":
        return EncoderConfig(kind="beats", path=str(hearing_folder(folder, seed=seed)))
    return EncoderConfig(
        kind="clip", path=str(vision_folder(folder, seed=seed)), select_layers=(2,)
    )


@pytest.fixture(params=["clip", "beats"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> EncoderConfig:
    return encoder(request.param, tmp_path / "weights")


def in_a_new_process(config: EncoderConfig) -> tuple[dict[str, object], bool]:
    """(the record, whether torch was imported for it)."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, config.model_dump_json()],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    record, torch = json.loads(done.stdout)
    return record, torch


def test_it_is_what_loading_says_and_is_loaded_once(
    config: EncoderConfig, remembered: Path
) -> None:
    expected = load_encoder(config).record()
    assert in_a_new_process(config) == (expected, True)
    assert in_a_new_process(config) == (expected, False)
    moved = config.model_copy(update={"path": str(Path(config.path).rename(remembered / "moved"))})
    assert in_a_new_process(moved) == (expected, False)


def test_a_changed_bit_of_the_weights_is_another_encoder(
    config: EncoderConfig, remembered: Path
) -> None:
    before = identify(config)
    file = Path(config.path) / "model.safetensors"
    stat = file.stat()
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].reshape(-1).view("uint8")[0] ^= 1
    save_file(tensors, file, {"format": "pt"})
    assert file.stat().st_size == stat.st_size
    after = identify(config)
    assert after.record == load_encoder(config).record()
    assert after.record["weights_sha256"] != before.record["weights_sha256"]


def test_another_choice_is_another_encoder(config: EncoderConfig, remembered: Path) -> None:
    identify(config)
    half = config.model_copy(update={"dtype": "bfloat16"})
    assert identify(half).record["compute_dtype"] == "bfloat16"
    if config.kind == "clip":
        one = config.model_copy(update={"select_layers": (1,)})
        assert identify(one).record["layers"] == [1]


def test_what_loading_refuses_is_refused_though_it_was_remembered(
    config: EncoderConfig, remembered: Path
) -> None:
    identify(config)
    folder = Path(config.path)
    if config.kind == "clip":
        (folder / "adapter_config.json").write_text("{}")
    else:
        (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=r"adapter|model_type"):
        identify(config)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"record": 1}', None])
def test_a_damaged_memory_is_made_anew(
    config: EncoderConfig, remembered: Path, damage: str | None
) -> None:
    before = identify(config)
    (path,) = (remembered / "encoders").iterdir()
    if damage is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(damage)
    assert identify(config) == before
    if damage is not None:
        assert json.loads(path.read_text())["record"] == before.record


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    config: EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "file"))
    assert identify(config).record == load_encoder(config).record()


def test_weights_that_changed_while_a_job_ran_are_refused(
    config: EncoderConfig, remembered: Path, tmp_path: Path
) -> None:
    other = "beats" if config.kind == "clip" else "clip"
    both = {config.kind: config, other: encoder(other, tmp_path / "beside")}
    spec = PreprocessSpec.model_validate(
        {
            "job": "preprocess",
            "name": "x",
            "data": [{"name": "x", "files": str(tmp_path)}],
            "cache": str(tmp_path / "cache"),
            "encoders": {"video": both["clip"], "audio": both["beats"]},
        }
    )
    stream = build_work(spec).streams["video" if config.kind == "clip" else "audio"]
    assert stream.make_encoder()
    shutil.rmtree(config.path)
    encoder(config.kind, Path(config.path), seed=7)
    with pytest.raises(ValueError, match=r"another encoder .*weights_sha256.*Start the job again"):
        stream.make_encoder()
