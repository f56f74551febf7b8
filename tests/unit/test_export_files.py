"""An export that was damaged is refused, by the name of its file, wherever it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_crab
import torch
from safetensors.torch import load_file, save_file

from crab.model.artifact import (
    ADAPTER_WEIGHTS,
    RECORD,
    WEIGHTS,
    load_model,
    save_model,
    verify_model,
)
from crab.model.artifact_files import DIGESTS, DamagedExportError, write_digests
from crab.model.llm import load_tokenizer
from jobs.adapters import language_model_of, load_adapter
from jobs.presets import llm_digest


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose language model lies beside it, as those of train jobs do."""
    folder = tmp_path_factory.mktemp("export")
    llm = folder / "llm"
    tiny_crab.plain_llm().save_pretrained(llm)
    tiny_crab.tokenizer().save_pretrained(llm)
    config = tiny_crab.config().llm.model_copy(update={"path": str(llm), "architecture": None})
    model, _, _ = tiny_crab.model(llm=config)
    lineage = {
        "manifest": "m" * 64,
        "base_model": llm_digest(str(llm)),
        "preset": "tiny",
        "llm_given": str(llm),
    }
    return save_model(model, load_tokenizer(str(llm)), folder / "adapter", lineage=lineage)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "adapter"))


def refused(folder: Path, match: str) -> None:
    """By all who read it: verify_model, load_model, and what predict and evaluate load with."""
    readers: tuple[Callable[[Path], Any], ...] = (
        verify_model,
        load_model,
        load_adapter,
        language_model_of,
    )
    for read in readers:
        with pytest.raises(DamagedExportError, match=match):
            read(folder)


def test_a_whole_export_is_not_refused(exported: Path) -> None:
    record = verify_model(exported)
    model, _ = load_adapter(exported)
    assert model.trainable_parameters()
    assert record["lineage"]["manifest"] == "m" * 64
    named = json.loads((exported / DIGESTS).read_text())
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert named.keys() == files - {DIGESTS}
    assert {RECORD, WEIGHTS, ADAPTER_WEIGHTS, "adapter/adapter_config.json"} <= named.keys()


def test_the_folder_that_peft_reads_says_by_itself_what_it_was_trained_on(exported: Path) -> None:
    lineage = json.loads((exported / "adapter" / "lineage.json").read_text())
    assert lineage == json.loads((exported / RECORD).read_text())["lineage"]
    assert lineage["base_model"] == llm_digest(str(exported.parent / "llm"))


def test_a_file_that_is_cut_flipped_or_gone_is_named(copy: Path) -> None:
    names = [*json.loads((copy / DIGESTS).read_text()), DIGESTS]
    assert len(names) > 5
    for name in names:
        whole = (copy / name).read_bytes()
        for at in (len(whole) // 3, len(whole) - 2):
            flipped = bytearray(whole)
            flipped[at] ^= 1
            (copy / name).write_bytes(flipped)
            with pytest.raises(DamagedExportError) as caught:
                verify_model(copy)
            # A digit of a digest: the file that it speaks of no longer fits.
            assert name == DIGESTS or str(copy / name) in str(caught.value)
            assert "crab run" in str(caught.value)
        for damaged in (whole[: len(whole) - 3], b""):
            (copy / name).write_bytes(damaged)
            with pytest.raises(DamagedExportError, match=name):
                verify_model(copy)
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError if name == RECORD else DamagedExportError, match=name):
            verify_model(copy)
        (copy / name).write_bytes(whole)
    verify_model(copy)


def test_all_readers_refuse(copy: Path) -> None:
    file = copy / ADAPTER_WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(copy, r"adapter_model\.safetensors .* is not the file that training wrote")
    file.write_bytes(whole)
    (copy / DIGESTS).unlink()
    refused(copy, r"digests\.json is absent")


@pytest.mark.parametrize("file", [WEIGHTS, ADAPTER_WEIGHTS])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: torch.empty(0), "have no elements"),
        (lambda t: torch.full_like(t, torch.nan), "NaN or infinity"),
        (lambda t: t.masked_fill(t == t.max(), torch.inf), "NaN or infinity"),
    ],
)
def test_weights_that_are_none_are_refused_though_their_digests_are_right(
    copy: Path, file: str, change: Callable[[torch.Tensor], torch.Tensor], match: str
) -> None:
    tensors = load_file(copy / file)
    name = sorted(tensors)[1]
    save_file(tensors | {name: change(tensors[name])}, copy / file)
    write_digests(copy)
    refused(copy, rf"{Path(file).name}: 1 tensors .*{match}.* first {name}|{match}.*{name}")


def test_an_export_of_no_tensors_is_refused(copy: Path) -> None:
    save_file({}, copy / ADAPTER_WEIGHTS)
    write_digests(copy)
    refused(copy, "holds no tensors")


def test_another_language_model_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.parent, tmp_path / "moved"))
    moved = folder / "adapter"
    record = json.loads((moved / RECORD).read_text())
    record["config"]["llm"]["path"] = str(folder / "llm")
    (moved / RECORD).write_text(json.dumps(record))
    write_digests(moved)
    load_adapter(moved)
    (weights,) = (folder / "llm").glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * (1 + 1e-6)}, weights, metadata={"format": "pt"})
    for read in (load_adapter, language_model_of):
        with pytest.raises(
            ValueError, match=r"trained on a language model with digest .* Train again"
        ):
            read(moved)
