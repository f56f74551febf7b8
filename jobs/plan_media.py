"""What a plan may know of media files without a job: whether they are there, their size and version, and on demand
their digest. Writes nothing, not even a temporary file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby, islice

import fsspec
from fsspec.core import url_to_fs

from crab_platform import source as media
from crab_platform.plan import CHUNK, Clip
from crab_platform.work import Source

_THREADS = 16
_BLOCK = 4 << 20


def by_folder(sources: Sequence[Source]) -> list[Source]:
    """Sources in an order in which remote files of one folder are neighbours: a folder is listed once."""
    return sorted(sources, key=_folder)


def clips_of(sources: Sequence[Source]) -> Iterator[Clip]:
    """The clips, in the order given (see `by_folder`)."""
    for batch in _batches(sources):
        version_of = media.versions([source.url for source in batch])
        clips = [_clip(source, version_of[source.url]) for source in batch]
        unsure = [n for n, clip in enumerate(clips) if clip.version is None]
        for n, clip in zip(unsure, _each(_look, [clips[n] for n in unsure]), strict=True):
            clips[n] = clip
        yield from clips


def hash_clips(clips: Sequence[Clip]) -> list[Clip]:
    """The same clips with the digests of their bytes, or with what is wrong with them."""
    return _each(_hash, clips)


def sha256_of(url: str) -> tuple[str, int]:
    """SHA-256 and size of a file. Raises OSError, or an error of the client of a remote store."""
    hasher, size = hashlib.sha256(), 0
    with fsspec.open(url.removeprefix("file://") if media.is_local(url) else url, "rb") as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
            size += len(block)
    return hasher.hexdigest(), size


def _batches(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Local files by CHUNK; remote ones by folder, which `versions` lists as a whole."""
    for folder, group in groupby(sources, _folder):
        while batch := list(islice(group, None if folder else CHUNK)):
            yield batch


def _folder(source: Source) -> str:
    return "" if media.is_local(source.url) else source.url.rpartition("/")[0]


def _clip(source: Source, version: str | None) -> Clip:
    """A version starts with a word and the size: file:1024:..., etag:1024:..."""
    size = version.split(":")[1] if version else ""
    return Clip(
        name=source.name,
        url=source.url,
        streams=source.streams,
        version=version,
        num_bytes=int(size) if size.isdigit() else None,
    )


def _look(clip: Clip) -> Clip:
    """A file without a version: is it there?"""
    if media.is_local(clip.url):
        return replace(clip, num_bytes=os.stat(clip.url.removeprefix("file://")).st_size)
    filesystem, path = url_to_fs(clip.url)
    size = filesystem.info(path).get("size")
    return replace(clip, num_bytes=size if isinstance(size, int) else None)


def _hash(clip: Clip) -> Clip:
    sha256, size = sha256_of(clip.url)
    return replace(clip, sha256=sha256, num_bytes=size)


def _each(look: Callable[[Clip], Clip], clips: Sequence[Clip]) -> list[Clip]:
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(partial(_try, look), clips))


def _try(look: Callable[[Clip], Clip], clip: Clip) -> Clip:
    try:
        return look(clip)
    except FileNotFoundError:
        return replace(clip, problem=media.NOT_FOUND)
    except Exception:  # any client's error: a plan tells it, and goes on
        return replace(clip, problem=media.UNREACHABLE)
