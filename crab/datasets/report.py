"""What an import says besides its samples: which rows became none and why, and what a person should know."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from crab.datasets.folder import Folder
from crab.samples import Sample

Kind = Literal["problem", "left_out", "duplicate"]
"""problem: the row does not fit. left_out: it fits, and gives no sample on purpose. duplicate: it says nothing new."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a row stands."""

    file: str
    """Relative to the imported folder."""
    line: int
    """Counted from 1; of the first line where a row has several."""


Found = tuple[Origin, Sample]


@dataclass
class Report:
    """`write` takes each row that is set aside, as it comes, so that a million of them need no memory."""

    write: Callable[[dict[str, str | int]], None]
    limit: int | None = None
    """Rows of each annotation file that are read; None: all."""
    rows: Counter[str] = field(default_factory=Counter)
    """Rows read, by annotation file."""
    counts: Counter[str] = field(default_factory=Counter)
    """By kind; and "covered": weak rows of clips that have exact labels."""
    notes: list[str] = field(default_factory=list)

    aside: Counter[str] = field(default_factory=Counter)
    """Rows set aside, by annotation file."""

    def set_aside(self, origin: Origin, reason: str, kind: Kind = "problem") -> None:
        self.counts[kind] += 1
        self.aside[origin.file] += 1
        self.write({"file": origin.file, "line": origin.line, "kind": kind, "reason": reason})

    def take(self, file: str) -> bool:
        """Counts one more row of a file; False, with a note, where the limit is reached."""
        if self.limit is not None and self.rows[file] >= self.limit:
            self.note(
                f"only the first {self.limit} rows of each annotation file were read, as asked"
            )
            return False
        self.rows[file] += 1
        return True

    def note(self, text: str) -> None:
        """Says it once, however often it comes."""
        if text not in self.notes:
            self.notes.append(text)


Reader = Callable[[Folder, Report], Iterator[Found]]


class Ids:
    """Stable ids: the n-th sample of one name in the order of the official files is `name#n`, the first just `name`."""

    def __init__(self) -> None:
        self._uses: Counter[str] = Counter()

    def take(self, name: str) -> str:
        self._uses[name] += 1
        count = self._uses[name]
        return name if count == 1 else f"{name}#{count}"
