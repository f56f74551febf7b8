"""Why a key is a miss: the entry of the same media whose record is nearest, and the fields in which it differs.

Commits are read once, one after the other, and nothing of them is kept but the best candidate of
each media that is asked about. Records are compared without their media: a cache of a million
clips has a handful of such *shapes*, so that two records are compared once and not a million times.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crab_platform.cache import FeatureCache
from crab_platform.commits import id_time_ns
from crab_platform.identity import differing_fields
from crab_platform.trust import FileName
from crab_platform.usage import read_usage

Ints = np.ndarray[Any, Any]
Differences = tuple[tuple[str, object, object], ...]
"""(field, value in the earlier record, value that is wanted) of each field that differs."""

NO_MEDIA = "0" * 64
SCANNED = (
    "record",
    "media_sha256",
    "source_url",
    "source_version",
    "run",
    "experiment",
    "team",
    "decode_s",
    "encode_s",
    "device",
    "length",
)
"""The columns of a commit that an explanation, or a rate, is made of."""

JOB = "job"
"""Column that `scan_all` adds where `run` is asked for: the name of the job, "" where no usage file tells it."""

_FIELD = '"media_sha256":"'
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_FAR = np.iinfo(np.int16).max


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Who made an entry, and when."""

    commit: str
    run: str = ""
    experiment: str = ""
    team: str = ""
    layer: str = ""
    """URL of the cache that it lies in, "" for the job's own."""
    job: str = ""
    """Name of the job, "" where it is not known."""

    @property
    def at(self) -> str:
        """When it was committed, by its maker's clock: UTC as 2026-11-23T20:38:21Z."""
        return time_of(self.commit)

    def told(self) -> str:
        """The same for a person."""
        more = [f"{name} {value}" for name, value in self._rest() if value]
        return ", ".join([maker(self.job, self.run), *more, self.at])

    def _rest(self) -> tuple[tuple[str, str], ...]:
        return (("experiment", self.experiment), ("team", self.team), ("in", self.layer))

    def record(self) -> dict[str, str]:
        """For JSON."""
        return {
            "job": self.job,
            "run": self.run,
            "experiment": self.experiment,
            "team": self.team,
            "at": self.at,
            "commit": self.commit,
            "layer": self.layer,
        }


def maker(job: str, run: str) -> str:
    """Who made something, for a person: "job prep (run 18c6bdf8)". Ids of MLflow by their first digits."""
    brief = run[:8] if _RUN_ID.fullmatch(run) else run
    if job:
        return f"job {job} (run {brief})" if run else f"job {job}"
    return f"run {brief}" if run else "a run without a name"


def time_of(identifier: str) -> str:
    """The time in a commit's id, UTC, to the second."""
    moment = datetime.fromtimestamp(id_time_ns(identifier) / 1e9, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def scan_all(cache: FeatureCache, columns: Sequence[str]) -> Iterator[tuple[str, FileName, Any]]:
    """(layer, name, table) of every usable commit, of the layers below first: what is nearer home is told of.

    With the column `run` comes JOB.
    """
    for store in reversed(cache.layers):
        below = FeatureCache(store, trust=cache.trust)
        for name, table in _with_jobs(below, columns):
            yield store.url, name, table
    for name, table in _with_jobs(cache, columns):
        yield "", name, table


def _with_jobs(cache: FeatureCache, columns: Sequence[str]) -> Iterator[tuple[FileName, Any]]:
    job_of: dict[str, str] | None = None
    for name, table in cache.scan(columns):
        if "run" not in columns:
            yield name, table
            continue
        if job_of is None:
            made = (usage for usage in read_usage(cache.store) if usage.kind == "preprocess")
            job_of = {usage.run: usage.job for usage in made if usage.run}
        runs = table.column("run").combine_chunks().dictionary_encode()
        names = pa.array([job_of.get(run, "") for run in runs.dictionary.to_pylist()], pa.string())
        yield name, table.append_column(JOB, names.take(runs.indices))


class Origins:
    """Origins by number; a commit has one or a few."""

    def __init__(self) -> None:
        self.origins: list[Origin] = []
        self._number: dict[Origin, int] = {}

    def numbers(self, layer: str, name: FileName, table: Any) -> Ints:
        """(n,) the number of each row's origin."""
        columns = [table.column(column) for column in ("run", "experiment", "team", JOB)]
        if all(len(column.unique()) <= 1 for column in columns):  # as our own writers make them
            one = (column[0].as_py() if len(column) else "" for column in columns)
            return np.full(table.num_rows, self._of(layer, name, *one), np.int32)
        rows = zip(*(column.to_pylist() for column in columns), strict=True)
        return np.asarray([self._of(layer, name, *row) for row in rows], np.int32)

    def _of(
        self, layer: str, name: FileName, run: str, experiment: str, team: str, job: str
    ) -> int:
        origin = Origin(
            commit=name.identifier,
            run=run,
            experiment=experiment,
            team=team,
            layer=layer,
            job=job,
        )
        if origin not in self._number:
            self._number[origin] = len(self.origins)
            self.origins.append(origin)
        return self._number[origin]


class Shapes:
    """Key records without their media, each kept once, by number."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        """With zeros for the media; {} for a row that holds no record."""
        self._number: dict[str, int] = {}

    def numbers(self, column: Any) -> Ints:
        """(n,) the number of each record's shape."""
        texts = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        numbers = np.zeros(len(texts), np.int32)
        at = pc.find_substring(texts, pattern=_FIELD).to_numpy(zero_copy_only=False)
        for place in np.unique(at).tolist():
            rows = np.flatnonzero(at == place)
            part = texts.take(pa.array(rows))
            if place >= 0:
                start = place + len(_FIELD)
                part = pc.binary_replace_slice(
                    part, start=start, stop=start + 64, replacement=NO_MEDIA
                )
            encoded = part.dictionary_encode()
            known = np.asarray(
                [self._of(text) for text in encoded.dictionary.to_pylist()], np.int32
            )
            numbers[rows] = known[encoded.indices.to_numpy(zero_copy_only=False)]
        return numbers

    def _of(self, text: str) -> int:
        if text not in self._number:
            try:
                record = json.loads(text)
            except ValueError:
                record = None
            self._number[text] = len(self.records)
            self.records.append(record if isinstance(record, dict) else {})
        return self._number[text]


class Nearest:
    """For each media and stream that is asked about, the entry whose record is nearest; of equals the last one.

    Media are told apart by 64 bits: two that share them would only spoil an explanation. Memory: 10
    bytes a media and stream.
    """

    def __init__(
        self, shapes: Shapes, wanted: Mapping[str, Mapping[str, Any]], media: Ints
    ) -> None:
        """`wanted`: stream's name -> record of its key, whatever its media; `media`: (n,) `media_words`, sorted,
        unique."""
        self._shapes = shapes
        self._wanted = wanted
        self._media = media
        self._seen = np.zeros(len(media), bool)
        self._distances: dict[str, list[int]] = {stream: [] for stream in wanted}
        self._best = {
            stream: (
                np.full(len(media), _FAR, np.int16),
                np.full(len(media), -1, np.int32),
                np.full(len(media), -1, np.int32),
            )
            for stream in wanted
        }

    def add(self, media: Ints, shapes: Ints, origins: Ints) -> None:
        """The rows of one commit: (n,) `media_words` of their media, and numbers."""
        if not len(self._media) or not len(media):
            return
        at = np.minimum(np.searchsorted(self._media, media), len(self._media) - 1)
        rows = np.flatnonzero(self._media[at] == media)
        if not len(rows):
            return
        at, shapes, origins = at[rows], shapes[rows], origins[rows]
        self._seen[at] = True
        for stream in self._wanted:
            table = self._distance_table(stream)
            distance = table[shapes]
            best, best_shape, best_origin = self._best[stream]
            better = np.flatnonzero((distance < _FAR) & (distance <= best[at]))
            # The last of several for one place counts: the nearest one.
            better = better[np.argsort(-distance[better], kind="stable")]
            best[at[better]] = distance[better]
            best_shape[at[better]] = shapes[better]
            best_origin[at[better]] = origins[better]

    def found(self, stream: str, media: Ints) -> tuple[Ints, Ints, Ints]:
        """(n,) of `media` -> (shape, origin, seen): numbers of the nearest entry, -1 where there is none of this
        kind of stream, and whether any entry has this media."""
        _, shape, origin = self._best[stream]
        at = np.searchsorted(self._media, media)
        return shape[at], origin[at], self._seen[at]

    def differences(self, stream: str, shape: int) -> Differences:
        """How a shape differs from what a stream wants."""
        return differences(self._shapes.records[shape], self._wanted[stream])

    def _distance_table(self, stream: str) -> Ints:
        known = self._distances[stream]
        for record in self._shapes.records[len(known) :]:
            is_kin = is_features(record) and record.get("stream") == self._wanted[stream]["stream"]
            known.append(len(differences(record, self._wanted[stream])) if is_kin else _FAR)
        return np.asarray(known, np.int16)


class Places:
    """Of URLs whose media the index does not tell: what commits know of them."""

    ELSEWHEN = 1
    """The URL was read before, at another version."""
    UNVERSIONED = 2
    """The URL was read before, when its version proved nothing."""
    SAME = 3
    """The URL was read before at this version: its entries were taken back, or they disagree."""

    def __init__(self, urls: Ints, versions: Ints) -> None:
        """`urls`: (n,) of `text_word` of each URL, `versions`: (n,) of its version now."""
        self._urls, first = np.unique(urls, return_index=True)
        self._versions = versions[first]
        self._state = np.zeros(len(self._urls), np.int8)
        self._origin = np.full(len(self._urls), -1, np.int32)

    def found(self, urls: Ints) -> tuple[Ints, Ints]:
        """(n,) of `urls` -> (state, origin): one of the above or 0, and a number or -1."""
        at = np.searchsorted(self._urls, urls)
        return self._state[at], self._origin[at]

    def add(self, table: Any, origins: Ints) -> None:
        """The rows of one commit."""
        if not len(self._urls) or not table.num_rows:
            return
        urls = table.column("source_url").to_pylist()
        words = np.asarray([text_word(url) for url in urls], np.uint64)
        at = np.minimum(np.searchsorted(self._urls, words), len(self._urls) - 1)
        rows = np.flatnonzero(self._urls[at] == words)
        if not len(rows):
            return
        versions = table.column("source_version").take(pa.array(rows)).to_pylist()
        is_same = (
            np.asarray([text_word(v) for v in versions], np.uint64) == self._versions[at[rows]]
        )
        state = np.where(is_same, self.SAME, self.ELSEWHEN)
        state[[not version for version in versions]] = self.UNVERSIONED
        self._state[at[rows]] = state
        self._origin[at[rows]] = origins[rows]


def differences(earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> Differences:
    """The fields that make two records of one media different keys."""
    fields = differing_fields(earlier, wanted)
    fields.pop("media_sha256", None)
    return tuple((name, old, new) for name, (old, new) in fields.items())


def is_features(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of features, not of decoded windows nor of anything else."""
    return "encoder" in record and "level" not in record


def text_word(text: str) -> int:
    """64 bits that stand for a URL or a version; 0 for none."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") if text else 0


def digest_bytes(digests: Sequence[str]) -> Ints:
    """64 hex digits each -> (n, 32) bytes. Raises ValueError for anything else."""
    raw = bytes.fromhex("".join(digests))
    if len(raw) != 32 * len(digests):
        raise ValueError("a digest has not 64 hex digits")
    return np.frombuffer(raw, np.uint8).reshape(-1, 32)


def media_words(digests: Ints) -> Ints:
    """(n, 32) bytes -> (n,) 64 bits that stand for each: its first and its last, mixed."""
    words = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)
    mixed: Ints = words[:, 0] ^ words[:, 3]
    return mixed
