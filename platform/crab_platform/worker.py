"""What runs in Ray workers: read, hash, look up, decode; encode, commit.

One call of `EncodeActor` makes at most one pack, and returns its rows after the commit. So a killed task loses what
it had not committed, and nothing that was reported is ever missing.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import pyarrow as pa
import ray

from crab_platform import source as media
from crab_platform.cache import FeatureCache
from crab_platform.identity import WINDOW
from crab_platform.index import CacheIndex
from crab_platform.manifest_reader import take_back
from crab_platform.packs import Entry, NewEntry, new_entry
from crab_platform.transit import File, Row, file_from_row, file_to_table, row_to_json
from crab_platform.work import Array, Decoder, DecodeTask, Source, Undecoded, Work

ENCODE_FAILED = "encode_failed"

_DECODERS: dict[bytes, Decoder] = {}
"""The decoder of this worker process: its child processes live from task to task, and end with the worker."""


SharedIndex = CacheIndex | tuple[Any]
"""An index, or where it lies in Ray's object store."""


def decode_task(table: pa.Table, work: Work, index: SharedIndex) -> Iterator[pa.Table]:
    decoder = _DECODERS.get(b"") or _DECODERS.setdefault(b"", work.make_decoder())
    for file in _decode(work, _sources(table), _known(index), decoder, work.open_cache()):
        yield file_to_table(file)


class EncodeActor:
    """Encodes and commits; in fused mode decodes as well. One pack a call."""

    def __init__(self, work: Work, index: SharedIndex) -> None:
        self._work = work
        self._index = _known(index)
        self._cache = work.open_cache()
        self._encoders = {s: todo.make_encoder() for s, todo in work.streams.items()}
        self._decoder = work.make_decoder() if work.config.mode == "fused" else None

    def __call__(self, table: pa.Table) -> pa.Table:
        if self._decoder is None:
            files: Iterator[File] = map(file_from_row, table.to_pylist())
        else:
            files = _decode(self._work, _sources(table), self._index, self._decoder, self._cache)
        return self._encode_and_commit(files)

    def _encode_and_commit(self, files: Iterator[File]) -> pa.Table:
        done: list[File] = []
        new: list[NewEntry] = []
        windows: list[NewEntry] = []
        for file in files:
            for stream, array in file.arrays.items():
                started = time.perf_counter()
                try:
                    new.append(self._encode(file, stream, array))
                except (ValueError, FloatingPointError) as error:
                    # A value that is not finite, or that the stored type cannot hold: this clip's.
                    file.lost[stream] = Undecoded(reason=ENCODE_FAILED, detail=str(error))
                file.seconds["encode"] += time.perf_counter() - started
                if stream in file.decode_s and array.nbytes <= self._work.keep_decoded_bytes:
                    windows.append(self._window(file, stream, array))
            file.arrays.clear()
            done.append(file)
        started = time.perf_counter()
        # In packs of their own: whoever reads features does not read around windows.
        if windows:
            self._cache.commit(windows)
        entries = {entry.key: entry for entry in self._cache.commit(new)} if new else {}
        if done:
            done[-1].seconds["commit"] += time.perf_counter() - started
        rows = [row for file in done for row in self._rows(file, entries)]
        return pa.table({"row": pa.array([row_to_json(row) for row in rows], pa.string())})

    def _encode(self, file: File, stream: str, array: Array) -> NewEntry:
        todo = self._work.streams[stream]
        started = time.perf_counter()
        features = self._encoders[stream](array)
        return new_entry(
            self._work.key(stream, file.sha256),
            features,
            source_url=file.source.url,
            source_version=file.version or "",
            decode_s=file.decode_s.get(stream, 0.0),
            encode_s=time.perf_counter() - started,
            device=todo.device,
            tolerance=todo.tolerance,
        )

    def _window(self, file: File, stream: str, array: Array) -> NewEntry:
        return new_entry(
            self._work.decoded_key(stream, file.sha256),
            {WINDOW: array},
            source_url=file.source.url,
            source_version=file.version or "",
            decode_s=file.decode_s[stream],
        )

    def _rows(self, file: File, entries: Mapping[str, Entry]) -> Iterator[Row]:
        streams = file.source.streams
        for position, stream in enumerate(streams):
            first, last = position == 0, position == len(streams) - 1
            common: dict[str, Any] = {
                "name": file.source.name,
                "stream": stream,
                "media_sha256": file.sha256,
                "seconds": dict(file.seconds) if first else {},
                "media_bytes": file.num_bytes if first else 0,
                "decoded": file.decoded and first,
                "last_of_file": last,
            }
            if stream in file.lost:
                lost = file.lost[stream]
                yield Row(status="set_aside", reason=lost.reason, detail=lost.detail, **common)
            elif stream in file.found:
                entry = file.found[stream]
                yield Row(status="hit", key=entry.key, entry=entry, **common)
            else:
                key = self._work.key(stream, file.sha256).digest
                yield Row(status="encoded", key=key, entry=entries[key], **common)


def _decode(
    work: Work,
    sources: Sequence[Source],
    index: CacheIndex,
    decoder: Decoder,
    cache: FeatureCache,
) -> Iterator[File]:
    """The files in the order given, a few ahead of the caller: decoding happens in child processes and encoding
    outside Python's lock, so both cores of a laptop are busy."""
    ahead = work.config.decode_processes + 1
    with ThreadPoolExecutor(work.config.decode_processes) as threads:
        waiting = deque[Future[File]]()
        for source in sources:
            waiting.append(threads.submit(_decode_one, work, source, index, decoder, cache))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode_one(
    work: Work, source: Source, index: CacheIndex, decoder: Decoder, cache: FeatureCache
) -> File:
    """Reads, hashes and looks up one file, and decodes what is missing and not kept decoded."""
    file = File(source=source)
    started = time.perf_counter()
    try:
        with media.fetch(source.url) as fetched:
            file.sha256, file.version = fetched.sha256, fetched.version
            file.num_bytes = fetched.num_bytes
            keys = {stream: work.key(stream, file.sha256).digest for stream in source.streams}
            found = index.lookup(keys.values())
            file.found = {stream: found[key] for stream, key in keys.items() if key in found}
            missing = [stream for stream in source.streams if stream not in file.found]
            file.arrays = _kept_windows(work, file.sha256, missing, index, cache)
            missing = [stream for stream in missing if stream not in file.arrays]
            file.seconds["read"] += time.perf_counter() - started
            if missing:
                started = time.perf_counter()
                requests = {stream: work.streams[stream].request for stream in missing}
                result = decoder(DecodeTask(path=fetched.path, requests=requests))
                file.decoded = True
                for stream in missing:
                    value = result[stream]
                    if isinstance(value, Undecoded):
                        file.lost[stream] = value
                    else:
                        file.arrays[stream] = value
                spent = time.perf_counter() - started
                file.seconds["decode"] += spent
                # One opening serves all streams; each bears its share.
                file.decode_s = {
                    stream: spent / len(missing) for stream in missing if stream in file.arrays
                }
    except media.SourceError as error:
        gone = Undecoded(reason=error.reason, detail=error.detail)
        file.lost = dict.fromkeys(source.streams, gone)
    return file


def _kept_windows(
    work: Work, sha256: str, streams: Sequence[str], index: CacheIndex, cache: FeatureCache
) -> dict[str, Array]:
    """What an earlier run decoded and kept of these streams. A damaged one is decoded again."""
    keys = {stream: work.decoded_key(stream, sha256).digest for stream in streams}
    entries = index.lookup(keys.values())
    known = [stream for stream in streams if keys[stream] in entries]
    if not known:
        return {}
    wanted = [entries[keys[stream]] for stream in known]
    found, bad = cache.read_each(wanted)
    for position, error in bad.items():
        # Else the next encoder would find it again, before the one that is stored now.
        take_back(cache, wanted[position], str(error), index)
    return {
        stream: arrays[WINDOW]
        for stream, arrays in zip(known, found, strict=True)
        if arrays is not None
    }


def _known(index: SharedIndex) -> CacheIndex:
    if isinstance(index, CacheIndex):
        return index
    return cast(CacheIndex, ray.get(index[0]))


def source_to_head(source: Source) -> str:
    """One source, as a table with the column `head` brings it to a worker."""
    return json.dumps([source.name, source.url, list(source.streams)])


def _sources(table: pa.Table) -> list[Source]:
    heads = (json.loads(text) for text in table.column("head").to_pylist())
    return [Source(name=name, url=url, streams=tuple(streams)) for name, url, streams in heads]
