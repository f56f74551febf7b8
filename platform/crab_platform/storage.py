"""One URL, one store: a folder or an S3 prefix with the same few verbs and the same promises.

Nothing is ever overwritten. `create` makes a whole file exist or fails, whoever else tries at the
same moment and whenever the process is killed; everything above (packs, commits, manifests) stands
on that. A store is its URL: it can be sent to another process, which opens it again with its own
credentials.

A folder is served with plain system calls (nothing is gained by going through obstore); S3 goes
through obstore, in `objects.py`.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from crab_platform.ranges import Piece, Range, allocate, deliver, plan

IN_FLIGHT = 32
"""Threads that read, for the whole process. At 8 MiB a request this bounds memory at 256 MiB; 20 ms
away it gives 12 GB/s.
"""

SMALL_BYTES = 1 << 20
SMALL_AT_ONCE = 8
"""Requests below SMALL_BYTES are made so many a thread: there is nothing but latency in them, and Python costs
more than the request. 256 in flight give 600 MB/s of 48 KiB samples 20 ms away.
"""

INCOMING = ".incoming"
"""Where a folder keeps half-written files. Names of stored files never start with a dot, so it is
never listed.
"""

_PATH = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*(?:/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*")

Data = bytes | bytearray | memoryview
Paths = list[str]
Buffers = list[memoryview]
OnRange = Callable[[str, int, memoryview], None]
"""(path, position among the ranges asked for, its bytes)"""
Files = list[bytes]
T = TypeVar("T")


class StoreError(Exception):
    """The store answered, and the answer is not what was asked for."""


class AlreadyExists(StoreError):  # noqa: N818 (named after the condition)
    """`create` found a file of that name; it was left as it is."""


class StoreUnreachable(StoreError):  # noqa: N818
    """The store cannot be used at all: no server, no such bucket, wrong credentials. The command
    line exits with 3.
    """


class StoreRefused(StoreUnreachable):
    """The store is there, and we may not do this in it: no permission to write, or to read."""


class ShortRead(StoreError):  # noqa: N818
    """A range ends after the end of the file."""


class Store(ABC):
    """The verbs. Paths are relative, with forward slashes, of letters, digits and `._=-`.

    Every method raises StoreUnreachable when the store cannot be used, ValueError for a path that
    is not allowed, and, where it reads, FileNotFoundError when there is no such file.
    """

    url: str

    @abstractmethod
    def create(self, path: str, data: Data) -> None:
        """Make `path` exist with exactly `data`, durably. Raises AlreadyExists and changes nothing
        if it exists.
        """

    @abstractmethod
    def read(self, path: str) -> bytes:
        """All bytes of a file."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Length of a file in bytes."""

    @abstractmethod
    def list(self, prefix: str = "") -> Paths:
        """All paths below the folder `prefix` (everything for ""), sorted. Empty when there is
        none.
        """

    @abstractmethod
    def delete(self, path: str) -> None:
        """Make `path` not exist; nothing happens when it does not. Names are never used again, so this cannot hit
        another writer's file. Only garbage collection, leases and pins call it.
        """

    @abstractmethod
    def _read_piece(self, path: str, piece: Piece) -> memoryview:
        """The bytes of a piece, in memory that nobody writes to; shorter when the file ends in it."""

    def _read_pieces(self, path: str, pieces: Sequence[Piece]) -> Sequence[memoryview]:
        """`_read_piece` for a few, at once where the store can."""
        return [self._read_piece(path, piece) for piece in pieces]

    def exists(self, path: str) -> bool:
        """Whether a file of that name is there now."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> Buffers:
        """Bytes of each (offset, length) of one file, in the order asked for. Raises ShortRead past
        the end.
        """
        return self.read_many({path: ranges})[path]

    def read_many(
        self, wanted: Mapping[str, Sequence[Range]], on_range: OnRange | None = None
    ) -> dict[str, Buffers]:
        """`read_ranges` for several files at once: neighbours coalesced, IN_FLIGHT threads over all files.

        The buffers are only to be read: they may share memory, where ranges overlap. Those of one call share
        allocations of up to 32 MiB, so one that is kept keeps its neighbours' memory.
        `on_range` is called as soon as a range is complete, in the thread that read it, while others are read.
        """
        buffers: dict[str, Buffers] = {}
        jobs: list[tuple[str, list[Piece]]] = []
        parts: dict[
            tuple[str, int], int
        ] = {}  # ranges that stand in several pieces: how many are to come
        for path, ranges in wanted.items():
            pieces = plan(ranges)
            buffers[path] = allocate(ranges, pieces)
            jobs += [(path, few) for few in _together(pieces)]
            if on_range:
                count = Counter(index for piece in pieces for index in piece.serves)
                parts.update({(path, index): n for index, n in count.items() if n > 1})
                for position in set(range(len(ranges))) - count.keys():  # of length zero
                    on_range(path, position, buffers[path][position])
        lock = threading.Lock()

        def done(path: str, position: int) -> None:
            assert on_range
            if (path, position) in parts:
                with lock:
                    parts[path, position] -= 1
                    if parts[path, position]:
                        return
            on_range(path, position, buffers[path][position])

        def fetch(job: tuple[str, list[Piece]]) -> None:
            path, pieces = job
            for piece, data in zip(pieces, self._read_pieces(path, pieces), strict=True):
                if len(data) != piece.stop - piece.start:
                    raise ShortRead(
                        f"{self.url}/{path}: asked for bytes {piece.start} to {piece.stop}, got "
                        f"{len(data)} of "
                        f"{piece.stop - piece.start}; the file is shorter than its index says"
                    )
                deliver(piece, data, wanted[path], buffers[path])
                if on_range:
                    for position in piece.serves:
                        done(path, position)

        _in_threads(fetch, jobs)
        return buffers

    def delete_all(self, paths: Sequence[str]) -> None:
        """`delete` for many, side by side and in no order."""
        _in_threads(self.delete, paths)

    def read_all(self, paths: Sequence[str]) -> Files:
        """All bytes of each file, IN_FLIGHT at a time, in the order asked for."""
        found: dict[str, bytes] = {}

        def fetch(path: str) -> None:
            found[path] = self.read(path)

        _in_threads(fetch, [*dict.fromkeys(paths)])
        return [found[path] for path in paths]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class FolderStore(Store):
    """A folder. It is made by the first `create`, not by opening or reading it."""

    def __init__(self, folder: str | Path) -> None:
        # Absolute, since a worker that opens the same URL stands in another directory.
        self._root = Path(folder).expanduser().absolute()
        self.url = str(self._root)

    def __reduce__(self) -> tuple[type[FolderStore], tuple[str]]:
        return (FolderStore, (self.url,))

    def create(self, path: str, data: Data) -> None:
        """Write aside, flush to disk, then link under the final name: the link fails if the name is
        taken.
        """
        target = self._root / check_path(path)
        incoming = self._root / INCOMING
        try:
            if target.exists():  # spares the write; the link below is what decides
                raise self._taken(path)
            incoming.mkdir(parents=True, exist_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = incoming / f"{os.getpid()}-{secrets.token_hex(8)}"
            try:
                with aside.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(aside, target)
                except FileExistsError as error:
                    raise self._taken(path) from error
            finally:
                aside.unlink(missing_ok=True)
            for folder in (target.parent, *target.parent.parents):
                _flush_folder(folder)
                if folder == self._root:
                    break
        except OSError as error:
            raise self._explain(error, path) from error

    def read(self, path: str) -> bytes:
        """All bytes of a file."""
        with self._open(path) as file:
            return file.read()

    def size(self, path: str) -> int:
        """Length of a file in bytes."""
        with self._open(path) as file:
            return os.fstat(file.fileno()).st_size

    def list(self, prefix: str = "") -> Paths:
        """All paths below `prefix`, sorted."""
        top = self._root / check_path(prefix) if prefix else self._root

        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise self._explain(error, prefix) from error

        found = []
        for folder, folders, files in os.walk(top, onerror=stop):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [
                Path(folder, name).relative_to(self._root).as_posix()
                for name in files
                if not name.startswith(".")
            ]
        return sorted(found)

    def delete(self, path: str) -> None:
        """Remove a file."""
        try:
            (self._root / check_path(path)).unlink(missing_ok=True)
        except OSError as error:
            raise self._explain(error, path) from error

    def _read_piece(self, path: str, piece: Piece) -> memoryview:
        with self._open(path) as file:
            file.seek(piece.start)
            return memoryview(file.read(piece.stop - piece.start))

    def _open(self, path: str) -> io.BufferedReader:
        try:
            return (self._root / check_path(path)).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{self.url}/{path} does not exist") from error
        except OSError as error:
            raise self._explain(error, path) from error

    def _taken(self, path: str) -> AlreadyExists:
        return AlreadyExists(f"{self.url}/{path} exists already and is never overwritten")

    def _explain(self, error: OSError, path: str) -> StoreError:
        place = f"{self.url}/{path}"
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            return StoreUnreachable(
                f"{place}: {error.strerror}. The folder must be on one file system with hard "
                "links, which make a file "
                "appear whole or not at all; use another folder or an s3:// URL"
            )
        if error.errno in (errno.EACCES, errno.EROFS):
            return StoreRefused(
                f"{place}: {error.strerror}; check who owns {self.url} and its mode"
            )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreUnreachable(f"{place}: {error.strerror}; free some space and start again")
        return StoreError(f"{place}: {error}")


def open_store(url: str | Path, *, create_budget_s: float = 60.0) -> Store:
    """The store at a folder path, a `file://` URL or `s3://bucket/prefix`.

    S3 takes endpoint, region and credentials from AWS_* variables, never from the URL or a file.
    `create_budget_s` bounds how long a create keeps trying on S3. Opening touches nothing; raises
    ValueError for any other URL and StoreUnreachable when the environment holds no credentials.
    """
    text = str(url)
    parts = urlsplit(text)
    if parts.scheme == "s3":
        from crab_platform.objects import ObjectStore  # a folder needs no S3 client

        return ObjectStore(text, create_budget_s=create_budget_s)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"{text!r} names the host {parts.netloc!r}; expected file:///absolute/path"
            )
        return FolderStore(unquote(parts.path))
    if "://" in text or not text:
        raise ValueError(
            f"cannot store at {text!r}; expected a folder, file:///path or s3://bucket/prefix"
        )
    return FolderStore(text)


def check_path(path: str) -> str:
    """`path` itself, or ValueError when it is absolute, climbs out, is hidden or holds odd
    characters.
    """
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"path {path!r} is not allowed in a store; expected segments of letters, digits and "
            "._=- "
            "with single slashes between them, none starting with a dot"
        )
    return path


def _flush_folder(folder: Path) -> None:
    """Make new names in a folder survive a power cut, not only a killed process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _together(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces of one file, small ones a few at a time."""
    small = [piece for piece in pieces if piece.stop - piece.start < SMALL_BYTES]
    large = [[piece] for piece in pieces if piece.stop - piece.start >= SMALL_BYTES]
    step = SMALL_AT_ONCE
    return large + [small[start : start + step] for start in range(0, len(small), step)]


def _in_threads(work: Callable[[T], None], jobs: Sequence[T]) -> None:
    """Do all jobs, IN_FLIGHT at a time; the first error ends the rest that have not started and is
    raised.
    """
    if len(jobs) == 1:
        work(jobs[0])
    elif jobs:
        futures = [_pool().submit(work, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)  # what runs still writes into the caller's buffers
            raise


@cache
def _pool() -> ThreadPoolExecutor:
    """One for the process: starting threads anew costs more than reading a few samples."""
    return ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="crab-read")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not in the child
