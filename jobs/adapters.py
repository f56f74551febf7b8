"""Exported adapters: found by folder or by the job that made them, and loaded with their language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crab.model.artifact import ADAPTER_WEIGHTS, RECORD, WEIGHTS, load_model, verify_model
from crab.model.collate import Collator
from crab.model.crab_model import CrabModel
from crab_platform.identity import digest, sha256_file
from jobs.output import finished_jobs, read_result
from jobs.presets import TINY, llm_digest
from jobs.spec import SpecError


def find_adapter(adapter: str, runs: str) -> Path:
    """The folder that a spec's `adapter` means: a folder, or the name of a finished train job."""
    if (Path(adapter) / RECORD).is_file():
        return Path(adapter)
    result = read_result(Path(runs) / adapter)
    if result is None or "adapter" not in result:
        raise SpecError(
            f"adapter {adapter!r} is neither a folder with {RECORD} nor a finished train job in {runs}; "
            + finished_jobs(Path(runs), "adapter", adapter)
        )
    return Path(str(result["adapter"]))


def read_record(folder: Path) -> dict[str, Any]:
    """crab.json of an adapter: its configuration and lineage."""
    return dict(json.loads((folder / RECORD).read_text()))


def adapter_digest(folder: Path) -> str:
    """What an exported adapter is: its record and its weights."""
    files = (folder / name for name in (RECORD, WEIGHTS, ADAPTER_WEIGHTS))
    digests = {}
    for file in files:
        if file.exists():  # a model without an adapter has no weights of one
            with file.open("rb") as opened:
                digests[file.name] = sha256_file(opened)
    return digest(digests)


def language_model_of(folder: Path) -> str:
    """Where the language model of an exported adapter lies.

    Raises ValueError when the one at hand is not the one that the adapter was trained on, or when a file of the adapter
    is damaged (DamagedExportError).
    """
    record = verify_model(folder)
    lineage = record["lineage"]
    tiny = lineage["preset"] == "tiny" and not lineage["llm_given"]
    # The tiny preset lies in the repository, which may have moved since.
    llm = str(TINY / "llm") if tiny else str(record["config"]["llm"]["path"])
    if llm_digest(llm) != lineage["base_model"]:
        raise ValueError(
            f"adapter {folder} was trained on a language model with digest {lineage['base_model'][:12]}; {llm} has "
            f"{llm_digest(llm)[:12]}. Train again (crab run, with the spec of the train job), or bring the old one back"
        )
    return llm


def load_adapter(folder: Path, device: str = "cpu") -> tuple[CrabModel, Collator]:
    """Model and collator of an exported adapter. Raises ValueError as `language_model_of` does."""
    model, tokenizer = load_model(folder, llm_path=language_model_of(folder))
    return model.to(device), Collator(model.config, tokenizer, model.table)
