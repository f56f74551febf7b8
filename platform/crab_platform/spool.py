"""Records on their way to a server that may be down: an append-only file, and a cursor that says how far it came.

A record is one line, `LENGTH CRC32 JSON`. Appending is one write call of some ten microseconds and asks nobody; what
the process handed to the system outlives kill -9 (a power cut may take the last seconds: nothing is synced on the way).
A torn line is known by its length and checksum and is left out, what comes after it counts.

    FOLDER/ID.jsonl     the records; its writer holds a lock on it as long as it lives
    FOLDER/ID.cursor    how much of it was delivered
    FOLDER/ID.files/    links to the files that records name, so that they may be replaced meanwhile
    FOLDER/ID.refused   records that the server will never take, each with its words
    FOLDER/ID.log       what the delivering process had to say
    FOLDER/lock         held by who delivers

ID sorts by time, so the oldest spool of a folder comes first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crab_platform.clock import SYSTEM

Record = Mapping[str, Any]
"""Plain values, as JSON holds them."""

FOLDER = "tracking"
"""Where the spools of a run lie in its folder."""

_AT_ONCE = 1 << 20
"""Bytes read in one go; a record may be longer."""


def frame(record: Record) -> bytes:
    """A record as its line."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%d %08x %s\n" % (len(text), zlib.crc32(text), text)


def unframe(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None when the line is not whole."""
    length, _, rest = line.partition(b" ")
    checksum, _, text = rest.removesuffix(b"\n").partition(b" ")
    if length != b"%d" % len(text) or checksum != b"%08x" % zlib.crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


class Spool:
    """The writing end. Threads may share it; another process opens it anew by its path."""

    def __init__(self, path: Path) -> None:
        """Goes on with a file that exists; FileNotFoundError when it was delivered and removed."""
        self.path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._torn = False
        self._files = 0

    @classmethod
    def create(cls, folder: Path, first: Record) -> Spool:
        """A new spool with its first record, locked by this process."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{SYSTEM.new_id()}.jsonl"
        hidden = path.with_suffix(".new")
        hidden.touch(mode=0o600, exist_ok=False)
        spool = cls(hidden)
        # Locked and begun before it has its name: whoever finds it unlocked may take its writer for dead.
        fcntl.lockf(spool._file, fcntl.LOCK_EX)
        spool.append(first)
        hidden.rename(path)
        spool.path = path
        return spool

    def append(self, record: Record) -> None:
        """Writes a record. Raises OSError when the disk does not take it."""
        data = frame(record)
        with self._lock:
            if self._torn:  # a full disk took a part of the last one: it must not spoil this one
                data = b"\n" + data
            self._torn = True
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(
                    f"{self.path}: only {written} of {len(data)} bytes written: disk full?"
                )
            self._torn = False

    def keep(self, path: Path) -> Path:
        """A link to a file, or to all files of a folder, which stays when they are replaced or deleted.

        On another file system there are no links: then the path itself. A file changed in place is changed here too.
        """
        with self._lock:
            self._files += 1
            number = self._files
        kept = files_of(self.path) / f"{os.getpid()}-{number}" / path.name
        kept.parent.mkdir(parents=True)
        try:
            if path.is_dir():
                shutil.copytree(path, kept, copy_function=os.link)
            else:
                os.link(path, kept)
        except (OSError, shutil.Error) as error:
            if not path.exists():
                raise FileNotFoundError(f"{path}: no such file or folder") from error
            shutil.rmtree(kept.parent)
            return path.absolute()
        return kept

    def close(self) -> None:
        """Nothing more comes; the lock is given back."""
        with self._lock:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1  # a number that comes again, for another file


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A whole record, or None for a spoiled line, and where the next one begins."""

    record: dict[str, Any] | None
    end: int


def read(path: Path, offset: int = 0) -> Iterator[Piece]:
    """The complete lines from `offset` on, to where the file ends now; a torn tail is not among them."""
    with path.open("rb", buffering=_AT_ONCE) as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            if line != b"\n":
                yield Piece(record=unframe(line), end=offset)


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """How far the delivery of a spool came."""

    offset: int = 0
    run_id: str | None = None
    """The server's name of the run, once known."""
    last_ms: int = 0
    """The time of the last record that has one."""
    ended: bool = False
    trouble: str = ""
    """Why it is not going on; empty while it is."""
    busy: str = ""
    """A step that may take minutes without being stuck: the upload of a file."""
    delivered: int = 0
    refused: int = 0
    damaged: int = 0


def load_cursor(path: Path) -> Cursor:
    """The cursor of a spool; a new one when nothing was delivered yet, or a power cut or another version spoiled it.

    Without it all is sent again, and the server asked for what it holds.
    """
    try:
        return Cursor(**json.loads(path.with_suffix(".cursor").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return Cursor()


def save_cursor(path: Path, cursor: Cursor) -> None:
    """Replaces the cursor of a spool, whole or not at all."""
    new = path.with_suffix(".cursor-new")
    new.write_text(json.dumps(asdict(cursor)))
    new.replace(path.with_suffix(".cursor"))


def files_of(path: Path) -> Path:
    """Where the linked files of a spool are."""
    return path.with_suffix(".files")


def spools(folder: Path) -> list[Path]:
    """The spools of a folder that are not delivered yet, the oldest first."""
    return sorted(folder.glob("*.jsonl"))


def is_written(path: Path) -> bool:
    """Whether the process that makes this spool lives. Not for that process itself: a look would give its lock back."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def set_aside(path: Path, record: Record, why: str) -> None:
    """Keeps a record that the server refused for good."""
    with path.with_suffix(".refused").open("a") as file:
        file.write(json.dumps({"why": why, "record": record}) + "\n")


def remove(path: Path) -> None:
    """Deletes a spool of which all is delivered; what was refused stays."""
    for suffix in (".log", ".cursor", ".jsonl"):
        path.with_suffix(suffix).unlink(missing_ok=True)
    shutil.rmtree(files_of(path), ignore_errors=True)


@contextmanager
def delivering(folder: Path, *, wait: bool) -> Iterator[bool]:
    """One process at a time delivers the spools of a folder; yields False when another one does and `wait` is off."""
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
