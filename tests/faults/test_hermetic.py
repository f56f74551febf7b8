"""Hermeticity (A9): while features are made, nothing is read that their key does not cover.

A fresh process decodes and encodes real clips under Python's audit hook, another under strace. What may be read comes
from the product: the media files, the files of each encoder's weights and settings, and code. Planted encoders that
read something else must be found, by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.crab_runs import ROOT
from support.planted_reads import LOOKS
from support.tiny_encoders import hearing_folder, vision_folder

from crab.encoders.config import EncoderConfig
from crab.encoders.declared import RESULT_VARIABLES, declared_files
from crab.encoders.load import load_encoder
from crab.synth.dataset import synthesise
from crab_platform import syscalls
from crab_platform.audit import Access, Declared, audited, judge, watched
from jobs.audit import judge_accesses, variables_that_are_set
from jobs.presets import TINY
from jobs.spec import PreprocessSpec, parse_spec

QUICK_CLIPS = 10
FULL_CLIPS = 200

SPEC: dict[str, Any] = {
    "job": "preprocess",
    "name": "audited",
    "data": [{"name": "clips", "files": "clips"}],
    "cache": "cache",
    "sampling": {"tasks": {"avqa": "music-avqa"}},
    "encoders": {
        "video": {"kind": "clip", "path": str(TINY / "clip"), "select_layers": [2, 4]},
        "audio": {"kind": "beats", "path": str(TINY / "beats")},
    },
}
needs_strace = pytest.mark.skipif(
    not syscalls.available(),
    reason="needs strace with leave to trace, to see what native code opens: apt-get install strace",
)


SENTENCES = {
    "file": "read the file {path}",
    "folder": "listed the folder {folder}",
    "variable": "asked for the variable CRAB_PLANTED_GAIN",
    "in environment": "asked for the variable CRAB_PLANTED_BIAS",
    "socket": "connected to ('127.0.0.1', 9)",
    "program": "started the program true",
}
"""What is said of each planted look that Python can see."""


def test_every_planted_look_is_tested() -> None:
    assert LOOKS.keys() == SENTENCES.keys() | {"native", "own file"}


def media_below(folder: Path) -> list[str]:
    kinds = {".mp4", ".mkv", ".mov", ".wav", ".mp3", ".jpg", ".png"}
    return sorted(str(path) for path in folder.rglob("*") if path.suffix in kinds)


def job(files: Sequence[str], look: str | None = None, path: str = "") -> dict[str, Any]:
    return {"files": list(files), "look": look, "path": path}


def command(how: str, jobs: Sequence[dict[str, Any]]) -> list[str]:
    asked = json.dumps({"spec": SPEC, "jobs": list(jobs)})
    return [sys.executable, "-m", "support.audited_child", how, asked]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "platform", "tests"))
    plain = {name: value for name, value in os.environ.items() if name not in RESULT_VARIABLES}
    return plain | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def audit_in_child(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        command("audit", jobs), env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def trace_child(jobs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[Access, ...]]:
    traced = syscalls.traced(command("trace", jobs), env=environment())
    assert traced.status == 0, traced.stderr[-3000:]
    return json.loads(traced.stdout.splitlines()[-1]), traced.accesses


def judged(files: Sequence[str], accesses: tuple[Access, ...]) -> tuple[str, ...]:
    spec = parse_spec(SPEC)
    assert isinstance(spec, PreprocessSpec)
    return judge_accesses(spec, files, accesses).problems


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    samples = synthesise(tmp_path_factory.mktemp("clips"), QUICK_CLIPS, seed=9, workers=1, size=64)
    return media_below(samples.parent / "clips")


@pytest.fixture(scope="module")
def real_media(shared_dir: Path) -> list[str]:
    """Clips, sounds and pictures of every container that we have, broken ones among them."""
    return media_below(shared_dir / "media")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that no key knows of, alone in its folder."""
    path = tmp_path_factory.mktemp("secret") / "gains.bin"
    path.write_bytes(b"12")
    return path


@pytest.fixture(scope="module")
def audits(clips: list[str], secret: Path) -> dict[str, dict[str, Any]]:
    """What one child found: about all clips, and with each planted look about one. A start costs seconds."""
    jobs = {"": job(clips)} | {look: job(clips[:1], look, str(secret)) for look in LOOKS}
    return dict(zip(jobs, audit_in_child(list(jobs.values())), strict=True))


def test_features_of_clips_are_made_of_what_their_keys_cover(
    clips: list[str], audits: dict[str, dict[str, Any]]
) -> None:
    assert audits[""]["problems"] == []
    # The audit had its eyes open.
    assert set(audits[""]["read"]) >= {*clips, str(TINY / "clip" / "config.json")}


def test_features_of_real_media_are_made_of_what_their_keys_cover(real_media: list[str]) -> None:
    (found,) = audit_in_child([job(real_media)])
    assert found["problems"] == []
    assert set(found["read"]) >= set(real_media)


@pytest.mark.parametrize("look", SENTENCES)
def test_an_encoder_that_looks_at_something_else_is_found(
    look: str, secret: Path, audits: dict[str, dict[str, Any]]
) -> None:
    sentence = SENTENCES[look].format(path=secret, folder=secret.parent)
    assert sentence in audits[look]["problems"]


def test_a_file_that_the_encoder_wrote_itself_is_no_input(
    audits: dict[str, dict[str, Any]],
) -> None:
    assert audits["own file"]["problems"] == []


@needs_strace
def test_native_code_opens_nothing_else_and_a_planted_look_of_its_is_found(
    clips: list[str], secret: Path, audits: dict[str, dict[str, Any]]
) -> None:
    (made, _), accesses = trace_child([job(clips), job(clips[:1], "native", str(secret))])
    assert made["made"] == made["made_by_children"] > 2 * len(clips)
    read = {access.what for access in accesses if access.kind == "read"}
    # Weights are read by Rust: no hook of Python's sees them.
    assert read >= {*clips, str(TINY / "clip" / "model.safetensors")}
    assert judged(clips, accesses) == (f"read the file {secret}",)
    # The reason for strace: Python does not see it.
    assert audits["native"]["problems"] == []


@pytest.mark.faults
def test_features_of_200_clips_are_made_of_what_their_keys_cover(
    tmp_path: Path, real_media: list[str]
) -> None:
    samples = synthesise(tmp_path / "clips", FULL_CLIPS, seed=10, size=64)
    clips = media_below(samples.parent / "clips")
    assert len(clips) == FULL_CLIPS
    files = [*clips, *real_media]
    (found,) = audit_in_child([job(files)])
    assert found["problems"] == []
    if syscalls.available():
        _, accesses = trace_child([job(files)])
        assert judged(files, accesses) == ()


def test_a_variable_that_changes_results_may_not_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RESULT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert variables_that_are_set() == ()
    for name in RESULT_VARIABLES:
        monkeypatch.setenv(name, "BF16")
        assert name in variables_that_are_set()[-1]
        monkeypatch.delenv(name)


# The declared files are those that count, and no others.


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_a_file_that_an_encoder_does_not_declare_does_not_change_it(
    kind: str, tmp_path: Path
) -> None:
    folder = (vision_folder if kind == "clip" else hearing_folder)(tmp_path / "encoder")
    layers = [2] if kind == "clip" else []
    config = EncoderConfig.model_validate(
        {"kind": kind, "path": str(folder), "select_layers": layers}
    )
    before = load_encoder(config).record()
    declared = declared_files(config)
    assert {path.name for path in declared} >= {"config.json", "model.safetensors"}
    for name in ("generation_config.json", "README.md", "vocab.json", "processor_config.json"):
        (folder / name).write_text("{}")
    assert declared_files(config) == declared
    with watched() as accesses:
        assert load_encoder(config).record() == before
    inside = {a.what for a in accesses if a.kind == "read" and a.what.startswith(str(folder))}
    assert inside <= {str(path) for path in declared}


# The audit itself.


def test_a_missing_declaration_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    declared = Declared(files=frozenset([str(path)]))
    assert audited(path.read_text, declared).ok
    bare = dataclasses.replace(declared, files=frozenset())
    assert audited(path.read_text, bare).problems == (f"read the file {path}",)


def test_a_link_to_a_declared_file_is_declared(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    assert audited(
        (tmp_path / "link").read_text, Declared(files=frozenset([str(tmp_path / "blob")]))
    ).ok


def test_data_beside_own_code_is_not_code(tmp_path: Path) -> None:
    declared = Declared(files=frozenset(), code=(str(tmp_path),))
    seen = [Access(kind="read", what=str(tmp_path / name)) for name in ("a.py", "table.json")]
    assert judge(seen, declared).problems == (f"read the file {tmp_path}/table.json",)


def test_a_file_is_no_input_only_after_it_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    read, made = Access(kind="read", what=path), Access(kind="make", what=path)
    assert judge([made, read], Declared(files=frozenset())).ok
    assert not judge([read, made], Declared(files=frozenset())).ok


def test_the_environment_is_itself_again_after_an_audit() -> None:
    plain = type(os.environ)
    with watched() as accesses:
        os.environ.get("CRAB_NOBODY")
        handed_on = os.environ | {"MORE": "1"}
    assert type(os.environ) is plain
    assert handed_on == dict(os.environ) | {"MORE": "1"}
    os.environ.get("CRAB_LATER")
    assert accesses == [Access(kind="variable", what="CRAB_NOBODY")]


def test_two_audits_at_once_are_refused() -> None:
    with watched(), pytest.raises(RuntimeError, match="under way"), watched():
        pass
    with watched():
        pass
