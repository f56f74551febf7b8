"""The page of a sweep, beside its sweep.json: report/index.html, one file that opens from the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crab.report.page import INDEX, new_folder
from crab.report.sweep import sweep_page, write_sweep

FOLDER = "report"


def make_sweep_report(sweep: Mapping[str, Any], folder: Path) -> Path:
    """Writes folder/report/index.html anew from a record with the schema of sweep.json, and returns its path.

    A page that is there stays until the new one is whole. Raises ValueError where the record is none of a sweep.
    """
    with new_folder(folder / FOLDER) as work:
        write_sweep(sweep_page(sweep), work)
    return folder / FOLDER / INDEX
