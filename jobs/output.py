"""What a person sees while a job works, and what is left of it: progress bars, tables, result.json."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

RESULT = "result.json"

console = Console(stderr=True, highlight=False)
"""For people. What a machine reads (--json) goes to standard output."""


@contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and remaining time on a terminal, one line at each tenth elsewhere."""
    on_terminal = sys.stderr.isatty()
    told = -1
    with tqdm(total=total, unit=f" {unit}", disable=not on_terminal, smoothing=0.1) as bar:

        def update(done: int, of: int) -> None:
            nonlocal told
            bar.total = of
            bar.update(done - bar.n)
            tenth = 10 * done // max(1, of)
            if not on_terminal and tenth != told:
                told = tenth
                console.print(f"{unit}: {done} of {of}")

        yield update


def line(text: str) -> None:
    """One line that is not wrapped: what somebody may want to copy."""
    console.print(text, soft_wrap=True)


_COPIED = 50
"""Characters: a job's name on a cluster has 47 at the most."""


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people. The first column, which names a row, is not broken where it is short enough to be copied."""
    printed = Table(title=title, title_justify="left")
    longest = max((len(str(row[0])) for row in rows), default=0)
    for number, name in enumerate(head):
        printed.add_column(name, overflow="fold", no_wrap=number == 0 and longest <= _COPIED)
    for row in rows:
        printed.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(printed)


def write_result(folder: Path, record: Mapping[str, Any], name: str = RESULT) -> None:
    """result.json of a run, whole or not at all; its presence says that the job ended well. Or another such file."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".result-")
    with os.fdopen(handle, "w") as file:
        json.dump(record, file, indent=2, sort_keys=True)
        file.write("\n")
    os.replace(temporary, folder / name)


def finished_jobs(runs: Path, key: str, name: str) -> str:
    """For errors: the finished jobs in `runs` whose result has `key`, the one nearest to `name` first."""
    found = [
        path.parent.name for path in runs.glob(f"*/{RESULT}") if key in json.loads(path.read_text())
    ]
    near = difflib.get_close_matches(name, found, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"finished there: {', '.join(sorted(found)) or 'none yet'}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """result.json of a run that ended well, else None."""
    path = folder / RESULT
    return dict(json.loads(path.read_text())) if path.exists() else None
