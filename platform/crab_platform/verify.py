"""Looks at what is stored: are the bytes what was committed, and does computing anew give the same?

Two questions of different price. The first reads an entry and checks its digest, as every reader
does. The second decodes the media again and encodes it again: it also finds entries that somebody
stored wrong on purpose, whose digests and signatures are all in order.

Goes through the commits one file at a time, in the order in which packs were written, and reads in
batches: memory does not grow with the cache. Layers below are their owners' to verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from crab_platform import commits, dtypes
from crab_platform import source as media
from crab_platform.cache import FeatureCache
from crab_platform.dtypes import relative_l2, tolerance_of
from crab_platform.identity import AnyKey, DecodedKey, digest
from crab_platform.packs import Array, Entry, new_entry
from crab_platform.quarantine import (
    CORRUPT,
    RECOMPUTED_OTHERWISE,
    BadEntry,
    bad_entry,
    read_quarantine,
    write_quarantine,
)
from crab_platform.trust import FileName
from crab_platform.work import Decoder, DecodeTask, Encode, Undecoded, Work

BATCH_BYTES = 64 << 20
BATCH_ENTRIES = 256

_COLUMNS = (*commits.COLUMNS.names[1:10], "media_sha256", "device", "tolerance")

OTHER_SETTINGS = "other_settings"
"""Of another encoder, sampling, decoder or type than the spec that recomputes."""
MEDIA_GONE = "media_gone"
MEDIA_CHANGED = "media_changed"
NOT_DECODED = "not_decoded"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An entry and what its commit says of how it was made."""

    entry: Entry
    record: str
    """The key record, JSON."""
    source_url: str
    media_sha256: str
    device: str
    tolerance: float
    commit_path: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong with an entry."""

    entry: Entry
    reason: str
    """CORRUPT or RECOMPUTED_OTHERWISE."""
    detail: str
    source_url: str

    def to_quarantine(self) -> BadEntry:
        return bad_entry(self.entry, self.reason, self.detail[:500])


@dataclass(frozen=True, kw_only=True)
class Unanswered:
    """An entry that could not be computed anew. That is no fault of the entry."""

    key: str
    source_url: str
    reason: str
    detail: str = ""


@dataclass(kw_only=True)
class Verified:
    """What was looked at and what was found."""

    entries: int = 0
    """In the cache, without those in quarantine already."""
    checked: int = 0
    bytes: int = 0
    bad: list[Finding] = field(default_factory=list)
    recomputed: int = 0
    unanswered: list[Unanswered] = field(default_factory=list)
    other_settings: int = 0
    """Checked, but not of the encoders that recompute."""
    largest_error: float = 0.0
    """Relative L2 error of the recomputed entries that were within their tolerance."""


OnProgress = Callable[[int, int], None]
"""(commits done, commits in all)."""


class Recompute(Protocol):
    """Computes the arrays of an entry anew, as readers would get them."""

    def __call__(self, stored: Stored) -> dict[str, Array] | Unanswered: ...


def verify(
    cache: FeatureCache,
    *,
    share: float = 1.0,
    seed: int = 0,
    recompute: Recompute | None = None,
    on_progress: OnProgress | None = None,
) -> Verified:
    """Checks a share of all entries, at least one: the same ones for the same seed.

    Raises ValueError for a share that is none.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of {share} to check; expected more than 0, at most 1")
    # Without the layers, and without the local tier, whose copies say nothing of the store.
    cache = FeatureCache(cache.store, trust=cache.trust, clock=cache.clock)
    result = Verified()
    smallest: tuple[float, Stored] | None = None
    batch: list[Stored] = []
    for stored in _entries(cache, result, on_progress):
        drawn = lot(stored.entry, seed)
        if drawn < share:
            batch.append(stored)
            if len(batch) >= BATCH_ENTRIES or _size(batch) >= BATCH_BYTES:
                _check(cache, batch, recompute, result)
                batch = []
        elif not result.checked and not batch and (smallest is None or drawn < smallest[0]):
            smallest = drawn, stored
    if not batch and not result.checked and smallest is not None:
        batch = [smallest[1]]
    _check(cache, batch, recompute, result)
    return result


def take_back(cache: FeatureCache, found: Sequence[Finding]) -> str:
    """Writes bad entries into quarantine, signed where the cache signs; returns the path. Their keys are misses.

    Raises ValueError when the cache trusts zones and signs as none: nobody would take notice.
    """
    if cache.trust.zones and cache.signer is None:
        raise ValueError(
            f"{cache.store.url} is read by zone, so what takes entries back must be signed: give the spec a cache.zone"
        )
    bad = [finding.to_quarantine() for finding in found]
    return write_quarantine(cache.store, bad, signer=cache.signer, clock=cache.clock)


class Recomputer:
    """Decodes and encodes as the job of `work` would, in this process. No entry of other settings."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._decoder: Decoder | None = None
        self._encoders: dict[str, Encode] = {}

    def __call__(self, stored: Stored) -> dict[str, Array] | Unanswered:
        entry = stored.entry

        def no(reason: str, detail: str = "") -> Unanswered:
            return Unanswered(
                key=entry.key, source_url=stored.source_url, reason=reason, detail=detail
            )

        found = self._stream_of(stored)
        if found is None:
            return no(OTHER_SETTINGS)
        name, key = found
        work = self._work.streams[name]
        try:
            with media.fetch(stored.source_url) as fetched:
                if fetched.sha256 != stored.media_sha256:
                    return no(MEDIA_CHANGED, f"now {fetched.sha256[:12]}")
                if self._decoder is None:
                    self._decoder = self._work.make_decoder()
                task = DecodeTask(path=fetched.path, requests={name: work.request})
                array = self._decoder(task)[name]
        except media.SourceError as error:
            return no(MEDIA_GONE, error.detail)
        if isinstance(array, Undecoded):
            return no(NOT_DECODED, f"{array.reason}: {array.detail}")
        if isinstance(key, DecodedKey):
            # It has one array, whatever that is called.
            window = stored.entry.tensors[0].name
            return as_read(new_entry(key, {window: array}).arrays)
        if name not in self._encoders:
            self._encoders[name] = work.make_encoder()
        return as_read(new_entry(key, self._encoders[name](array)).arrays)

    def _stream_of(self, stored: Stored) -> tuple[str, AnyKey] | None:
        """Which stream of the work has this key."""
        for name in self._work.streams:
            for make in (self._work.key, self._work.decoded_key):
                key: AnyKey = make(name, stored.media_sha256)
                if key.digest == stored.entry.key:
                    return name, key
        return None


def as_read(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Arrays as they are stored -> as readers get them."""
    return dtypes.restored({n: (dtypes.stored_type(a), a) for n, a in arrays.items()})


def allowed_error(stored: Stored) -> float:
    """Relative L2 error that computing anew may have: what the commit says, but never more than is known to be
    needed, since whoever stores a wrong entry says what suits him. A commit that does not say gets that, too.
    """
    record = json.loads(stored.record)
    encoder = record.get("encoder")
    try:
        most = tolerance_of(record["dtype"], encoder.get("compute_dtype", "float32"))
    except (KeyError, AttributeError):  # decoded windows, or types of another version
        return 0.0
    return min(stored.tolerance, most) if stored.device else most


def _entries(
    cache: FeatureCache, result: Verified, on_progress: OnProgress | None
) -> Iterator[Stored]:
    """Every entry of the cache that is not in quarantine, with several sources once."""
    gone = {(bad.key, bad.commit) for _, bad in read_quarantine(cache.store, cache.trust)}
    total = len(cache.store.list(commits.COMMITS)) if on_progress else 0
    for done, (name, table) in enumerate(cache.scan(_COLUMNS)):
        seen: set[str] = set()
        for row in table.to_pylist():
            key = row["key"]
            if key in seen or (key, name.identifier) in gone:
                continue
            seen.add(key)
            result.entries += 1
            yield _stored(row, name)
        if on_progress:
            on_progress(done + 1, max(total, done + 1))


def _stored(row: Mapping[str, Any], name: FileName) -> Stored:
    places = ("key", "pack", "offset", "length", "blake3")
    return Stored(
        entry=Entry(
            **{one: row[one] for one in places},
            tensors=commits.specs_from_json(row["tensors"]),
            commit=name.identifier,
        ),
        record=row["record"],
        source_url=row["source_url"],
        media_sha256=row["media_sha256"],
        device=row["device"],
        tolerance=row["tolerance"],
        commit_path=name.path,
    )


def _check(
    cache: FeatureCache,
    batch: Sequence[Stored],
    recompute: Recompute | None,
    result: Verified,
) -> None:
    arrays, wrong = cache.read_each([stored.entry for stored in batch])
    for at, stored in enumerate(batch):
        result.checked += 1
        result.bytes += stored.entry.length
        if at in wrong:
            # Garbage collection may have taken the commit, and then the pack, since it was read.
            if cache.store.exists(stored.commit_path):
                result.bad.append(_finding(stored, CORRUPT, str(wrong[at])))
            continue
        if lie := _lie(stored):
            result.bad.append(_finding(stored, CORRUPT, lie))
        elif recompute is not None:
            found = arrays[at]
            assert found is not None
            _compare(stored, found, recompute(stored), result)
        arrays[at] = None  # one entry's features at a time while others are computed anew


def _lie(stored: Stored) -> str:
    """What a commit says of an entry that cannot be true, "" for nothing. A lie here would hide the entry from those
    who look for what they can compute anew."""
    try:
        record = json.loads(stored.record)
        key, of_media = digest(record), record["media_sha256"]
    except (ValueError, TypeError, KeyError):
        return "its commit holds no key record"
    if key != stored.entry.key:
        return f"its commit holds the record of key {key[:12]}"
    return "" if of_media == stored.media_sha256 else "its commit names other media than its key"


def _compare(
    stored: Stored,
    found: Mapping[str, Array],
    anew: Mapping[str, Array] | Unanswered,
    result: Verified,
) -> None:
    if isinstance(anew, Unanswered):
        if anew.reason == OTHER_SETTINGS:
            result.other_settings += 1
        else:
            result.unanswered.append(anew)
        return
    result.recomputed += 1
    error, limit = relative_l2(anew, found), allowed_error(stored)
    if error <= limit:
        result.largest_error = max(result.largest_error, error)
        return
    detail = f"relative L2 error {error:.3g} to what it is now, {limit:.3g} allowed"
    result.bad.append(_finding(stored, RECOMPUTED_OTHERWISE, detail))


def _finding(stored: Stored, reason: str, detail: str) -> Finding:
    return Finding(entry=stored.entry, reason=reason, detail=detail, source_url=stored.source_url)


def lot(entry: Entry, seed: int) -> float:
    """A number in [0, 1), the lot that an entry draws: it is checked when the lot is below the share. Nobody who
    writes an entry can foresee it without the seed."""
    text = f"{seed}:{entry.commit}:{entry.key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2.0**64


def _size(batch: Iterable[Stored]) -> int:
    return sum(stored.entry.length for stored in batch)
