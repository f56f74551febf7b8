"""Media files where they lie: a local path or any URL that fsspec opens.

The bytes are read once. A local file is hashed in place (the decoder then finds it in the page cache); a remote one
is written to a temporary file while it is hashed. A *version* says cheaply that a file is still the one that was
hashed before: for a local file its size, times and inode, for an object its ETag and size.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

NOT_FOUND = "not_found"
UNREACHABLE = "unreachable"

_BLOCK = 4 << 20
_SETTLED_S = 2.0
"""A file changed less than this before it was hashed may change again within one tick of the file system's clock."""


class SourceError(Exception):
    """The bytes of a media file cannot be had; `reason` is NOT_FOUND or UNREACHABLE."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A media file on this machine."""

    path: str
    sha256: str
    num_bytes: int
    version: str | None
    """None when the file is too fresh for its version to prove anything."""


def is_local(url: str) -> bool:
    """Whether a URL is a path on this machine."""
    return "://" not in url or url.startswith("file://")


def versions(urls: Iterable[str]) -> dict[str, str | None]:
    """The version of each file, None where there is none to be had (missing, unreachable, no ETag).

    Remote files are asked for by folder, not one by one.
    """
    found: dict[str, str | None] = {}
    remote: dict[str, list[str]] = {}
    for url in urls:
        if is_local(url):
            try:
                found[url] = _local_version(os.stat(_local_path(url)))
            except OSError:
                found[url] = None
        else:
            remote.setdefault(url.rpartition("/")[0], []).append(url)
    for folder, members in remote.items():
        found |= _remote_versions(folder, members)
    return found


@contextmanager
def fetch(url: str) -> Iterator[Fetched]:
    """The file as a local path with its SHA-256, for as long as the block lasts.

    Raises SourceError when the file is missing or cannot be read.
    """
    try:
        if is_local(url):
            path = _local_path(url)
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                sha256, size = _hash(iter(lambda: file.read(_BLOCK), b""))
                after = os.fstat(file.fileno())
            version: str | None = _local_version(after)
            # Not settled, or written to while we read: the digest may not be that of the file as it is now.
            if version != _local_version(before) or time.time() - after.st_mtime < _SETTLED_S:
                version = None
            fetched = Fetched(path=path, sha256=sha256, num_bytes=size, version=version)
        else:
            fetched = _download(url)
    except Exception as error:  # sorted below; what is not about the file is raised again
        if _is_missing(url, error):
            raise SourceError(NOT_FOUND, str(error) or url) from error
        # Clients of remote stores have errors of their own: botocore's are not OSErrors.
        if isinstance(error, OSError) or not is_local(url):
            raise SourceError(UNREACHABLE, f"{url}: {error or type(error).__name__}") from error
        raise
    try:
        yield fetched
    finally:
        if not is_local(url):
            os.unlink(fetched.path)


def _is_missing(url: str, error: Exception) -> bool:
    """Whether an error says that there is no such file."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    # fsspec says "no such file" of an HTTP server that fails or does not answer, too.
    return not (
        url.startswith(("http://", "https://"))
        and cause is not None
        and not isinstance(cause, FileNotFoundError)
        and getattr(cause, "status", None) not in (404, 410)
    )


def _local_path(url: str) -> str:
    return url.removeprefix("file://")


def _local_version(stat: os.stat_result) -> str:
    return f"file:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def _remote_version(info: Mapping[str, Any]) -> str | None:
    etag = info.get("ETag") or info.get("etag")
    return f"etag:{info.get('size')}:{str(etag).strip(chr(34))}" if etag else None


def _remote_versions(folder: str, urls: list[str]) -> dict[str, str | None]:
    filesystem, path = url_to_fs(folder)
    try:
        listing = {entry["name"]: entry for entry in filesystem.ls(path, detail=True, refresh=True)}
    except Exception:  # any client's error: the read that follows tells the reason
        # No such folder, no answer, or a filesystem that cannot list. Then every file is read, which tells the reason.
        return dict.fromkeys(urls)
    names = {url: f"{path.rstrip('/')}/{url.rpartition('/')[2]}" for url in urls}
    return {url: _remote_version(listing[n]) if n in listing else None for url, n in names.items()}


def _download(url: str) -> Fetched:
    handle, path = tempfile.mkstemp(prefix="crab-media-", suffix=Path(url).suffix)
    try:
        with os.fdopen(handle, "wb") as target, fsspec.open(url, "rb") as source:

            def blocks() -> Iterator[bytes]:
                while block := source.read(_BLOCK):
                    target.write(block)
                    yield block

            sha256, size = _hash(blocks())
            info = getattr(source, "details", None) or {}
    except BaseException:
        os.unlink(path)
        raise
    return Fetched(path=path, sha256=sha256, num_bytes=size, version=_remote_version(info))


def _hash(blocks: Iterator[bytes]) -> tuple[str, int]:
    hasher, size = hashlib.sha256(), 0
    for block in blocks:
        hasher.update(block)
        size += len(block)
    return hasher.hexdigest(), size
