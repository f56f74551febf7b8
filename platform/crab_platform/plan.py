"""What a preprocessing job would do: for every clip and stream hit, miss or set aside, and why. Touches nothing.

    clips -> [known media at this version?] -> keys -> held? -> hit
          -> the misses: one pass over the commits -> the nearest entry of the same media, and measured rates

The planner asks the store for what a job asks for, and writes nothing: no lease, no file. A clip
costs about 100 bytes here, beside the 250 a row of the index; names and URLs stay with the caller.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crab_platform import condemned
from crab_platform.cache import FeatureCache
from crab_platform.catalog import manifest_path
from crab_platform.explain import (
    NO_MEDIA,
    SCANNED,
    Ints,
    Nearest,
    Origins,
    Places,
    Shapes,
    digest_bytes,
    media_words,
    scan_all,
)
from crab_platform.plan_lookup import QUARANTINED, HashClips, Lookup, Todo
from crab_platform.plan_lookup import Aside as Aside
from crab_platform.plan_lookup import Clip as Clip
from crab_platform.plan_table import Counted, Group, Outcome, Table
from crab_platform.quarantine import read_quarantine
from crab_platform.rates import Rates
from crab_platform.storage import Store
from crab_platform.work import Work

CHUNK = 10_000
"""Clips that are looked up together."""

KEY_DIFFERS = "key_differs"
STREAM_NEW = "stream_new"
NEVER_SEEN = "never_seen"
FILE_CHANGED = "file_changed"
VERSION_UNKNOWN = "version_unknown"
IN_FLUX = "in_flux"
UNSURE = "unsure"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer for all clips."""

    clips: int
    streams: int
    """Streams of clips: what an entry of the cache holds."""
    statuses: Mapping[str, int]
    """"hit", "miss" and "set_aside"."""
    groups: tuple[Counted, ...]
    sample: tuple[Outcome, ...]
    """The first streams that are no hits, at most as many as were asked for."""
    todo: Mapping[str, Todo]
    """By name of the stream."""
    to_read: int
    """Files that the run opens."""
    bytes_to_read: int
    size_unknown: int
    """How many of the files to read have no known size."""
    to_hash: int
    """Files whose bytes must be read to know their key; they may turn out to be hits."""
    spared: tuple[float, float]
    """Seconds of decoding and of encoding that the hits cost when they were made."""
    rates: Rates
    skipped_commits: Mapping[str, int]
    """Commits that were not used, by reason."""
    _table: Table

    def outcomes(self, names: Iterable[str]) -> Iterator[Outcome]:
        """Every stream of every clip; `names` are those of the clips, in the order in which they were planned."""
        return self._table.outcomes(names)


OnProgress = Callable[[int], None]
"""(clips looked up)."""


def make_plan(
    cache: FeatureCache,
    work: Work,
    clips: Iterable[Clip],
    *,
    before: Mapping[tuple[str, str], Aside] | None = None,
    limit: int = 20,
    with_rates: bool = True,
    hash_clips: HashClips | None = None,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Looks up all clips, then explains the misses.

    `clips` is gone through once; `before` is what the job's last manifest set aside, by name and
    stream; `hash_clips` reads those files whose media no commit tells. Commits are read only when
    there is a miss, or `with_rates`.

    Raises ValueError for a stream that `work` does not have, StoreUnreachable.
    """
    stores = (cache.store, *cache.layers)
    index = cache.index({store.url: condemned.left_out(store)[1] for store in stores})
    bad = {
        entry.key: entry.reason
        for store in stores
        for _, entry in read_quarantine(store, cache.trust)
    }
    skipped = Counter(
        reason for one in (index, *index.below) for reason in one.skipped_commits.values()
    )
    lookup = Lookup(work, index, bad=bad, before=before or {}, limit=limit, hash_clips=hash_clips)
    del index
    remaining = iter(clips)
    while chunk := list(islice(remaining, CHUNK)):
        lookup.add(chunk)
        if on_progress:
            on_progress(lookup.clips)
    # The index is the largest thing in memory, and has no more to say.
    table = lookup.finish()
    shapes, origins = Shapes(), Origins()
    rates = Rates(shapes, origins)
    if with_rates or len(table.open_rows()):
        _explain(cache, work, table, shapes, origins, rates, bool(bad))
    groups = table.counted()
    statuses = Counter({"hit": 0, "miss": 0, "set_aside": 0})
    for counted in groups:
        statuses[counted.group.status] += counted.count
    sample = (
        outcome
        for number, name in lookup.sampled
        for outcome in table.of_clip(number, name)
        if outcome.group.status != "hit"
    )
    return Plan(
        clips=lookup.clips,
        streams=len(table.group),
        statuses=dict(statuses),
        groups=groups,
        sample=tuple(islice(sample, limit)),
        todo=lookup.todo(),
        to_read=lookup.to_read,
        bytes_to_read=lookup.bytes_to_read,
        size_unknown=lookup.size_unknown,
        to_hash=lookup.to_hash,
        spared=(lookup.decode_s, lookup.encode_s),
        rates=rates,
        skipped_commits=dict(skipped),
        _table=table,
    )


def set_aside_before(store: Store, manifest_digest: str) -> dict[tuple[str, str], Aside]:
    """What a manifest has set aside, by name and stream; {} when it is gone. Reads a few columns, keeps these rows."""
    try:
        data = store.read(manifest_path(manifest_digest))
    except FileNotFoundError:
        return {}
    columns = ["source", "stream", "status", "reason", "media_sha256"]
    found: dict[tuple[str, str], Aside] = {}
    for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(columns=columns):
        for row in batch.filter(pc.equal(batch.column("status"), "set_aside")).to_pylist():
            aside = Aside(media_sha256=row["media_sha256"], reason=row["reason"])
            found[row["source"], row["stream"]] = aside
    return found


def _explain(
    cache: FeatureCache,
    work: Work,
    table: Table,
    shapes: Shapes,
    origins: Origins,
    rates: Rates,
    any_bad: bool,
) -> None:
    """One pass over the commits; then every row has its group."""
    rows = table.open_rows()
    clips = table.clip_of(rows)
    media = media_words(table.media)
    wanted = {name: work.key(name, NO_MEDIA).record() for name in work.streams}
    nearest = Nearest(shapes, wanted, np.unique(media[clips[table.known[clips]]]))
    asked = np.unique(clips[table.url[clips] > 0])
    places = Places(table.url[asked], table.version[asked])
    for layer, name, columns in scan_all(cache, SCANNED):
        try:
            theirs = media_words(digest_bytes(columns.column("media_sha256").to_pylist()))
        except ValueError:  # the index passes over such a commit, too
            continue
        numbers = shapes.numbers(columns.column("record"))
        made_by = origins.numbers(layer, name, columns)
        nearest.add(theirs, numbers, made_by)
        places.add(columns, made_by)
        rates.add(columns, numbers, made_by)
    table.origins = origins.origins
    for number, stream in enumerate(table.stream_names):
        mine = table.stream[rows] == number
        here = mine & table.known[clips]
        unseen = _from_media(table, nearest, stream, rows[here], media[clips[here]])
        _from_places(table, places, stream, np.concatenate([rows[mine & ~here], unseen]), any_bad)


def _from_media(table: Table, nearest: Nearest, stream: str, rows: Ints, media: Ints) -> Ints:
    """Explains rows whose media is known; returns those whose media no commit names."""
    if not len(rows):
        return rows
    shapes, origins, seen = nearest.found(stream, media)
    for shape in np.unique(shapes).tolist():
        if shape < 0:
            group = Group(stream=stream, status="miss", reason=STREAM_NEW)
        else:
            fields = nearest.differences(stream, shape)
            reason = KEY_DIFFERS if fields else IN_FLUX
            group = Group(stream=stream, status="miss", reason=reason, fields=fields)
        table.group[rows[shapes == shape]] = table.groups.of(group)
    table.origin[rows] = origins
    return rows[~seen]


def _from_places(table: Table, places: Places, stream: str, rows: Ints, any_bad: bool) -> None:
    """Explains rows whose media is not known, or in no commit, by what is known of their URL."""
    if not len(rows):
        return
    urls = table.url[table.clip_of(rows)]
    state, origin = np.zeros(len(rows), np.int8), np.full(len(rows), -1, np.int32)
    has_url = urls > 0
    state[has_url], origin[has_url] = places.found(urls[has_url])
    # Where its media was hashed and is in no commit, the URL had other bytes, whatever the version.
    hashed = table.known[table.clip_of(rows)]
    state[hashed & (state > 0)] = Places.ELSEWHEN
    reasons = {
        0: NEVER_SEEN,
        Places.ELSEWHEN: FILE_CHANGED,
        Places.UNVERSIONED: VERSION_UNKNOWN,
        Places.SAME: QUARANTINED if any_bad else UNSURE,
    }
    for value, reason in reasons.items():
        group = Group(stream=stream, status="miss", reason=reason)
        if (state == value).any():
            table.group[rows[state == value]] = table.groups.of(group)
    table.origin[rows] = origin
