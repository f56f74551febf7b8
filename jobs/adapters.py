"""Exported adapters: found by folder or by the job that made them, and loaded with their language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crab.model.artifact import RECORD, load_model
from crab.model.collate import Collator
from crab.model.crab_model import CrabModel
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


def load_adapter(folder: Path, device: str = "cpu") -> tuple[CrabModel, Collator]:
    """Model and collator of an exported adapter.

    Raises ValueError when the language model at hand is not the one that the adapter was trained on.
    """
    lineage = read_record(folder)["lineage"]
    tiny = lineage["preset"] == "tiny" and not lineage["llm_given"]
    # The tiny preset lies in the repository, which may have moved since.
    llm = str(TINY / "llm") if tiny else str(read_record(folder)["config"]["llm"]["path"])
    if llm_digest(llm) != lineage["base_model"]:
        raise ValueError(
            f"adapter {folder} was trained on a language model with digest {lineage['base_model'][:12]}; {llm} has "
            f"{llm_digest(llm)[:12]}. Train again, or bring the old one back"
        )
    model, tokenizer = load_model(folder, llm_path=llm)
    return model.to(device), Collator(model.config, tokenizer, model.table)
