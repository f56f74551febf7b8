"""Where the presets' encoders and models come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crab.encoders.config import TINY_SELECT_LAYERS, EncoderConfig
from crab.model import config as crab_config
from crab.model.config import CrabConfig
from crab_platform.identity import digest, sha256_file
from crab_platform.source import fetch, versions
from jobs.spec import Encoders, Model, SpecError

TINY = Path(__file__).resolve().parent.parent / "crab" / "presets" / "tiny"
"""Weights in the repository, made by `crab run jobs/specs/pretrain-tiny.yaml`."""

DIGESTS = "digests.json"
"""In the preset's folder: file -> SHA-256."""

_hashed: dict[tuple[Path, str | None], str] = {}
"""SHA-256 of files by path and version: a sweep asks for the same preset some hundred times a minute."""


def tiny_folder(name: str) -> Path:
    """A folder of the tiny preset: clip, beats, llm or initial.

    Raises SpecError where a file of the preset is absent or not the one that pretraining wrote.
    """
    if not (TINY / DIGESTS).is_file():
        raise SpecError(
            f"{TINY / DIGESTS} is absent; the preset is damaged: git checkout crab/presets"
        )
    expected = json.loads((TINY / DIGESTS).read_text())
    found = file_digests(TINY)
    if wrong := sorted(
        file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file)
    ):
        raise SpecError(
            f"{TINY / wrong[0]} is not the file that {DIGESTS} names ({len(wrong)} such files); bring the preset back "
            "(git checkout crab/presets), or make it anew with jobs/specs/pretrain-tiny.yaml"
        )
    return TINY / name


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder, by its path there; DIGESTS itself is left out."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != DIGESTS]
    found = versions(map(str, files))
    return {p.relative_to(folder).as_posix(): _digest(p, found[str(p)]) for p in files}


def _digest(path: Path, version: str | None) -> str:
    known = _hashed.get((path, version))
    if known is None:
        with fetch(str(path)) as file:
            known = file.sha256
            if file.version is not None:  # not one that has just been changed
                _hashed[path, file.version] = known
    return known


def write_digests(folder: Path) -> None:
    (folder / DIGESTS).write_text(json.dumps(file_digests(folder), indent=2) + "\n")


def encoder_configs(spec: Encoders) -> tuple[EncoderConfig, EncoderConfig]:
    """(video, audio) encoders of a spec."""
    video, audio = spec.video, spec.audio
    if spec.preset == "tiny":
        video = video or EncoderConfig(
            kind="clip", path=str(tiny_folder("clip")), select_layers=TINY_SELECT_LAYERS
        )
        audio = audio or EncoderConfig(kind="beats", path=str(tiny_folder("beats")))
    if video is None or audio is None:
        without = (
            f"the preset {spec.preset!r} brings no weights"
            if spec.preset
            else "without a preset there are no weights"
        )
        examples = {
            "video": "{kind: clip, path: /models/clip-vit-l-14, select_layers: [14, 22, 23]}",
            "audio": "{kind: beats, path: /models/beats.pt}",
        }
        given = {"video": video, "audio": audio}
        todo = [
            f"--set 'encoders.{name}={example}'"
            for name, example in examples.items()
            if given[name] is None
        ]
        raise SpecError(
            f"encoders: {without}; give a CLIP folder for video and a BEATs checkpoint for audio, for "
            f"example {' '.join(todo)}"
        )
    return _absolute(video), _absolute(audio)


def _absolute(config: EncoderConfig) -> EncoderConfig:
    """Workers stand in other folders."""
    return (
        config.model_copy(update={"path": os.path.abspath(config.path)}) if config.path else config
    )


def crab_model_config(spec: Model) -> CrabConfig:
    """The model that a spec describes: the preset, then the LLM's folder, then what is set by hand."""
    if spec.preset == "tiny":
        coarse, fine = (f"layer_{layer}" for layer in TINY_SELECT_LAYERS)
        config = crab_config.tiny(
            spec.llm or str(tiny_folder("llm")),
            video_layer=fine,
            video_size=_width(tiny_folder("clip"), "hidden_size"),
            mask_layers=(coarse, fine),
            audio_size=_width(tiny_folder("beats"), "encoder_embed_dim"),
            initial=None if spec.llm else _initial(),
        )
    else:
        if not spec.llm:
            raise SpecError(
                "model: the preset 'paper' needs model.llm, the folder of Llama-2-7B-chat"
            )
        config = crab_config.paper(spec.llm)
    return CrabConfig.model_validate(_merge(config.model_dump(), spec.set))


def llm_digest(folder: str) -> str:
    """What a language model's folder holds, wherever it lies: its configuration, weights and tokenizer."""
    names = ("config.json", "tokenizer.json", "tokenizer.model")
    path = Path(folder)
    files = sorted({*path.glob("*.safetensors"), *(path / n for n in names if (path / n).exists())})
    record: dict[str, Any] = {}
    for file in files:
        with file.open("rb") as opened:
            record[file.name] = sha256_file(opened)
    return digest(record)


def _initial() -> str | None:
    """First values for the preset's own LLM and encoders, where the preset has them; others start from random ones."""
    folder = tiny_folder("initial")
    return str(folder) if folder.is_dir() else None


def _width(folder: Path, field: str) -> int:
    record = json.loads((folder / "config.json").read_text())
    found = record.get(field) or record.get("cfg", {}).get(field)
    if not isinstance(found, int):
        raise SpecError(
            f"{folder}/config.json says no {field}; the preset is damaged: git checkout crab/presets"
        )
    return found


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = (
            _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return merged
