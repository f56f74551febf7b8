"""A worker's own disk before the store: entries that were read once are read again from NVMe.

    <folder>/<first 2 hex>/<BLAKE3 of the entry>

Unlike the store it may forget: over its size it drops what was used least recently. It is only ever
a copy, so nothing here fails a job. A file that is absent, short, damaged or just being deleted by
another process is a miss; a full or broken disk ends the writing and is said once. The reader checks
every entry by its digest, as it does with the store's bytes.

Any number of processes of a machine share one folder. Files appear whole, by rename, and are never
changed. When a file was last used is its mtime, since many disks are mounted without access times.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import math
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from crab_platform.packs import Entry
from crab_platform.storage import Data

KEEP = 0.9
"""Share of the size that is left after a cleaning, so that the next one is not at once."""

LOOK_EVERY = 1 / 16
"""Share of the size that a process writes before it looks again what all of them have written. So
n processes together are over the size by at most n/16 of it.
"""

AHEAD = 16
"""Files that the system is told of before the first is read, so that an NVMe disk is not idle between
two. Measured against eight threads and against none: 2 to 5 times as fast (docs/scale.md).
"""

ABANDONED_S = 3600.0
"""A file that has been half-written for so long was left by a process that died."""

_NAME = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_INCOMING = ".incoming"
_LOCK = ".cleaning"
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class LocalTier:
    """At most about `max_bytes` of entries in a folder. Safe among threads and processes; picklable.

    The folder is made by the first `put`. Raises ValueError for a size below one byte.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; expected at least 1")
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._until_look = 0
        """Bytes that this process may still write before it looks at the folder."""
        self._writes = True
        self._told: set[str] = set()

    def __reduce__(self) -> tuple[type[LocalTier], tuple[str, int]]:
        return (LocalTier, (str(self.folder), self.max_bytes))

    def __repr__(self) -> str:
        return f"LocalTier({str(self.folder)!r}, {self.max_bytes})"

    def get(self, entries: Sequence[Entry]) -> dict[str, bytearray]:
        """The bytes of those entries that are here, by BLAKE3; of the right length, not yet checked.

        They count as used now. An entry whose digest is not 64 hex digits is a miss.
        """
        wanted = {entry.blake3: entry for entry in entries if _NAME.fullmatch(entry.blake3)}
        found = {}
        for batch in _batches(list(wanted.values()), AHEAD):
            opened = [(entry, self._open(entry)) for entry in batch]
            for entry, file in opened:
                if file is not None and (data := self._read(entry, file)) is not None:
                    found[entry.blake3] = data
        return found

    def put(self, entry: Entry, data: Data) -> None:
        """Keep a copy of an entry's checked bytes, unless it is too large or the disk does not take it.

        Raises ValueError when the digest is not 64 hex digits or `data` is not as long as the entry.
        """
        path = self._path(entry)
        if len(data) != entry.length:
            raise ValueError(f"entry {entry.key} has {entry.length} bytes, not {len(data)}")
        if not self._writes or len(data) > KEEP * self.max_bytes:
            return
        try:
            if not path.exists():
                self._write(path, data)
                self._account(len(data))
        except FileNotFoundError:
            pass  # somebody removed the folder just now; the next `put` makes it again
        except OSError as error:
            self._writes = False
            advice = "free some space" if error.errno in _FULL else "check the disk and its owner"
            self._tell(
                "write",
                f"the local tier {self.folder} takes no more entries: {error.strerror}; reading goes "
                f"on from it and from the store. To use it again, {advice} and start the job anew",
            )

    def drop(self, entry: Entry) -> None:
        """Forget an entry whose bytes turned out to be wrong. Raises ValueError as `put` does."""
        with suppress(OSError):
            self._path(entry).unlink()

    def _path(self, entry: Entry) -> Path:
        if not _NAME.fullmatch(entry.blake3):
            raise ValueError(
                f"entry {entry.key} has the digest {entry.blake3!r}; expected 64 lower-case hex digits"
            )
        return self.folder / entry.blake3[:2] / entry.blake3

    def _open(self, entry: Entry) -> io.FileIO | None:
        try:
            file = self._path(entry).open("rb", buffering=0)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            return file
        except FileNotFoundError:
            return None
        except OSError as error:
            self._unreadable(error)
            return None

    def _read(self, entry: Entry, file: io.FileIO) -> bytearray | None:
        try:
            with file:
                if os.fstat(file.fileno()).st_size == entry.length:
                    data = bytearray(entry.length)
                    view, at = memoryview(data), 0
                    while at < entry.length and (count := file.readinto(view[at:])):
                        at += count
                    if at == entry.length:
                        with suppress(OSError):  # a read-only disk still serves
                            os.utime(file.fileno())
                        return data
        except OSError as error:
            self._unreadable(error)
            return None
        self.drop(entry)
        return None

    def _write(self, path: Path, data: Data) -> None:
        """Aside, then under its name. Not flushed to disk: what a power cut tears, the digest finds."""
        incoming = self.folder / _INCOMING
        incoming.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(exist_ok=True)
        aside = incoming / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with aside.open("xb", buffering=0) as file:
                view, at = memoryview(data), 0
                while at < len(
                    view
                ):  # one call may take less than all when the disk is nearly full
                    at += file.write(view[at:]) or 0
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _account(self, written: int) -> None:
        """Look at the whole folder now and then, and clean it when it is over its size."""
        with self._lock:
            self._until_look -= written
            if self._until_look >= 0:
                return
            # Other threads go on meanwhile; they look again after as much more.
            self._until_look = int(self.max_bytes * LOOK_EVERY)
        with self._alone() as alone:
            if alone:
                left = self.max_bytes - self._clean()
                with self._lock:
                    self._until_look = max(0, min(self._until_look, left))

    def _clean(self) -> int:
        """Delete the least recently used files down to KEEP when there are too many; returns the bytes left.

        Two walks instead of one sorted list, which for a million files would take 200 MB: the first
        counts bytes by age, in steps of 4 %, the second deletes what is older than the step at which
        enough is gone.
        """
        self._sweep_incoming()
        now = time.time_ns()
        by_age: Counter[int] = Counter()
        for _, size, mtime_ns in self._files():
            by_age[_age_step(now, mtime_ns)] += size
        total = by_age.total()
        if total <= self.max_bytes:
            return total
        excess = total - int(self.max_bytes * KEEP)
        older = 0  # bytes in the steps that go as a whole
        for step in sorted(by_age, reverse=True):
            if older + by_age[step] >= excess:
                break
            older += by_age[step]
        of_this_step, freed = excess - older, 0
        for path, size, mtime_ns in self._files():
            # A file used since the first walk is of age 0 now, and stays.
            age = _age_step(now, mtime_ns)
            if age > step or (age == step and of_this_step > 0):
                with suppress(FileNotFoundError):
                    os.unlink(path)
                freed += size
                of_this_step -= size if age == step else 0
        return total - freed

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """(path, bytes, mtime in ns) of every entry; those that vanish meanwhile are passed over."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as folders:
            for folder in folders:
                if not _FOLDER.fullmatch(folder.name):
                    continue
                with suppress(FileNotFoundError), os.scandir(folder.path) as files:
                    for file in files:
                        # Only what this class wrote: a wrong folder in a spec must not be emptied.
                        if _NAME.fullmatch(file.name):
                            with suppress(FileNotFoundError):
                                found = file.stat(follow_symlinks=False)
                                yield file.path, found.st_size, found.st_mtime_ns

    def _sweep_incoming(self) -> None:
        with suppress(FileNotFoundError), os.scandir(self.folder / _INCOMING) as files:
            for file in files:
                with suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > ABANDONED_S:
                        os.unlink(file.path)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether this process cleans: not while another does, or both would delete for the same need."""
        with (self.folder / _LOCK).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _unreadable(self, error: OSError) -> None:
        self._tell("read", f"the local tier {self.folder} is not readable: {error}")

    def _tell(self, what: str, message: str) -> None:
        with self._lock:
            if what in self._told:
                return
            self._told.add(what)
        log.warning(message)


def _batches(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _age_step(now_ns: int, mtime_ns: int) -> int:
    """Ages in steps of 2**(1/16), so that a few hundred counters hold nanoseconds and years."""
    return int(16 * math.log2(max(0, now_ns - mtime_ns) + 1))
