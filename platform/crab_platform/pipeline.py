"""Clips to cached features: look up, decode the misses, encode, commit, and say what happened to every clip.

    sources -> [known by version? then its key is known] -> hit: done, no file is opened
            -> Ray Data: read once + hash + look up -> decode -> encode -> commit -> one small row a stream

The cache is the only state. An encode task takes as many clips as fill one pack, and returns its rows after the
commit; a task that dies is run again by Ray and a job that dies is started again by a person: either way only what was
not committed is redone. No feature and no frame travels to the driver.

The graph itself is in `ray_graph.py`. This file knows nothing of the model: decoders and encoders come in as callables.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from crab_platform import source as media
from crab_platform.cache import load_index
from crab_platform.catalog import Manifest
from crab_platform.commit_table import content_of
from crab_platform.copying import copy_entries
from crab_platform.holding import JobHold, hold_job, publish_manifest
from crab_platform.index import CacheIndex
from crab_platform.leases import kept
from crab_platform.snapshots import snapshot_commits
from crab_platform.storage import StoreError
from crab_platform.transit import Row
from crab_platform.usage import encoder_label
from crab_platform.work import Source, Work


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a job did. Counts are of streams of files, since that is what an entry of the cache holds."""

    files: int
    hits: int
    encoded: int
    set_aside: Mapping[str, int]
    decoded_files: int
    media_bytes_read: int
    feature_bytes_written: int
    seconds: Mapping[str, float]
    """Busy seconds by stage, added over all workers, and the wall time of the whole."""
    manifest: str
    by_encoder: Mapping[str, EncoderUse] = field(default_factory=dict)
    """What each encoder's features cost, or would have cost without the cache."""


@dataclass(frozen=True, kw_only=True)
class EncoderUse:
    """Streams that one encoder had to do with in a job."""

    hits: int
    encoded: int
    saved_decode_s: float
    """Seconds that the hits cost when they were made."""
    saved_encode_s: float
    spent_decode_s: float
    spent_encode_s: float
    device: str


SNAPSHOT_AFTER = 500
"""Loose commits in an index after which a job writes a snapshot: they cost every job that starts half a second here,
and ten on S3 (docs/scale.md)."""

OnProgress = Callable[[int, int], None]
"""(files done, files in all)."""

Stream = Callable[[Work, Sequence[Source], CacheIndex], Iterator[Row]]
"""Decodes, encodes and commits what these files lack; gives a row a stream, after its commit."""


def preprocess(
    work: Work,
    sources: Sequence[Source],
    on_progress: OnProgress | None = None,
    stream: Stream | None = None,
) -> tuple[Manifest, Summary]:
    """Brings the features of all sources into the cache and writes the manifest of what there is.

    Files that cannot be read, decoded or have no such stream stand in the manifest as set aside, with their reason.
    `stream` is what computes the misses: Ray Data where none is given.

    Raises:
        ValueError: two sources of one name, or a stream that `work` does not say how to encode.
        StoreUnreachable: the cache cannot be reached.
    """
    _check(work, sources)
    started = time.perf_counter()
    report = on_progress or (lambda done, total: None)
    cache = work.open_cache()
    hold = hold_job(cache, work.name, work.by)
    try:
        with kept(hold.holders):
            return _preprocess(work, sources, report, started, hold, stream or _on_ray)
    except BaseException:
        # The store may be why: the first error is the one to tell.
        with suppress(StoreError):
            hold.release()
        raise


def _preprocess(
    work: Work,
    sources: Sequence[Source],
    report: OnProgress,
    started: float,
    hold: JobHold,
    stream: Stream,
) -> tuple[Manifest, Summary]:
    cache = hold.cache
    index = cache.index(hold.exclude)
    rows, rest = _known(work, sources, index)
    done = len(sources) - len(rest)
    report(done, len(sources))
    looked_up = time.perf_counter() - started
    tally = _Tally()
    if rest:
        for row in stream(work, rest, index):
            rows.append(tally.add(row))
            done += row.last_of_file
            report(done, len(sources))
    # Another team's cache that takes no lease from us may lose them at any time.
    borrowed = [row.entry for row in rows if row.entry and row.entry.layer in hold.not_held]
    if borrowed:
        copied = copy_entries(cache, borrowed)
        lost = {
            entry.key for entry in borrowed if content_of(entry.key, entry.blake3) not in copied
        }
        damaged = {row.name for row in rows if row.key in lost}
        if damaged:
            # Only its owners can take it back. By an index that does not know it, it is made anew, for us.
            rows = [row for row in rows if row.name not in damaged]
            own = load_index(cache.store, cache.trust, exclude=hold.exclude[cache.store.url])
            again = [source for source in sources if source.name in damaged]
            rows += [tally.add(row) for row in stream(work, again, own)]
    if borrowed or any(row.status == "encoded" for row in rows):
        index = cache.index(hold.exclude)
    rows = _settled(rows, index)
    names = {source.name: (source.name, *source.aliases) for source in sources}
    hold.check()
    manifest = publish_manifest(
        hold,
        [row.manifest_row(name) for row in rows for name in names[row.name]],
        keep_s=work.keep_s,
    )
    # Who reads by zone takes only snapshots that are signed.
    if index.loose_commits >= SNAPSHOT_AFTER and (cache.signer or not cache.trust.zones):
        snapshot_commits(cache)
    seconds = tally.seconds
    seconds["look up"] += looked_up
    seconds["wall"] = time.perf_counter() - started
    return manifest, Summary(
        files=len(sources),
        hits=sum(row.status == "hit" for row in rows),
        encoded=sum(row.status == "encoded" for row in rows),
        set_aside=dict(Counter(row.reason for row in rows if row.status == "set_aside")),
        decoded_files=tally.decoded,
        media_bytes_read=tally.media_bytes,
        feature_bytes_written=sum(
            row.entry.length for row in rows if row.entry and row.status == "encoded"
        ),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        manifest=manifest.digest,
        by_encoder=_by_encoder(work, rows, index),
    )


@dataclass(kw_only=True)
class _Tally:
    """What the workers did, added up."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    media_bytes: int = 0
    decoded: int = 0

    def add(self, row: Row) -> Row:
        for stage, spent in row.seconds.items():
            self.seconds[stage] += spent
        self.media_bytes += row.media_bytes
        self.decoded += row.decoded
        return row


def _settled(rows: Sequence[Row], index: CacheIndex) -> list[Row]:
    """The rows with the entries that count: another job may have committed the same keys a moment before us."""
    found = index.lookup([row.key for row in rows if row.entry])
    return [replace(row, entry=found.get(row.key, row.entry)) for row in rows]


def _by_encoder(work: Work, rows: Sequence[Row], index: CacheIndex) -> dict[str, EncoderUse]:
    keys: defaultdict[tuple[str, str], defaultdict[str, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        if row.entry:
            todo = work.streams[row.stream]
            keys[encoder_label({"encoder": todo.encoder}), todo.device][row.status].append(row.key)
    found = {}
    for (name, device), by_status in keys.items():
        saved, spent = index.cost(by_status["hit"]), index.cost(by_status["encoded"])
        found[name] = EncoderUse(
            hits=len(by_status["hit"]),
            encoded=len(by_status["encoded"]),
            saved_decode_s=saved[0],
            saved_encode_s=saved[1],
            spent_decode_s=spent[0],
            spent_encode_s=spent[1],
            device=device,
        )
    return found


def _check(work: Work, sources: Sequence[Source]) -> None:
    names = Counter(name for s in sources for name in (s.name, *s.aliases))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} source names stand twice, the first: {sorted(twice)[:3]}")
    for source in sources:
        unknown = set(source.streams) - set(work.streams)
        if unknown:
            raise ValueError(
                f"source {source.name} wants the streams {sorted(unknown)}; "
                f"this job knows {sorted(work.streams)}"
            )


def _known(
    work: Work, sources: Sequence[Source], index: CacheIndex
) -> tuple[list[Row], list[Source]]:
    """Rows of the sources whose every stream is in the cache by what is known without opening a file; the rest."""
    version_of = media.versions([source.url for source in sources])
    known = index.known_media([(source.url, version_of[source.url]) for source in sources])
    keys: dict[tuple[int, str], str] = {}
    """(position of the source, stream) -> key."""
    for stream in work.streams:
        asked = [
            (position, sha256)
            for position, (source, sha256) in enumerate(zip(sources, known, strict=True))
            if sha256 is not None and stream in source.streams
        ]
        digests = work.key_digests(stream, [sha256 for _, sha256 in asked])
        keys |= {(p, stream): key for (p, _), key in zip(asked, digests, strict=True)}
    found = index.lookup(keys.values())
    rows: list[Row] = []
    rest: list[Source] = []
    for position, (source, sha256) in enumerate(zip(sources, known, strict=True)):
        if sha256 is None or any(keys[position, s] not in found for s in source.streams):
            rest.append(source)
            continue
        rows += [
            Row(
                name=source.name,
                stream=stream,
                status="hit",
                key=keys[position, stream],
                media_sha256=sha256,
                entry=found[keys[position, stream]],
            )
            for stream in source.streams
        ]
    return rows, rest


def _on_ray(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
    # Ray takes seconds to import and more to start; a job that finds everything needs none of it.
    from crab_platform.ray_graph import on_ray

    yield from on_ray(work, sources, index)
