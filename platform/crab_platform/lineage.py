"""From an adapter to the clips it has seen, and back: adapter -> run -> manifest -> clips.

Nothing here is written for lineage alone. Which manifest a job read or made stands in its usage file
(`usage.py`) and in the result of its run; which clips a manifest holds, in the manifest.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crab_platform.catalog import MANIFESTS, Manifest
from crab_platform.storage import Store
from crab_platform.usage import Usage


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a job, from whatever tells of it. An empty field is not known."""

    kind: str
    job: str
    run: str = ""
    """Id in MLflow."""
    manifest: str = ""
    adapter: str = ""
    """Digest of the adapter that it made (train) or used (evaluate)."""
    adapter_folder: str = ""
    experiment: str = ""
    team: str = ""
    at_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class ClipCount:
    """What a manifest holds."""

    clips: int
    """Names of sources."""
    streams: int
    """Rows with features."""
    set_aside: int
    first: tuple[str, ...]
    """Some names, in order."""


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """One stream of a clip in a manifest."""

    manifest: str
    source: str
    stream: str
    media_sha256: str
    reason: str
    """Why it was set aside, "" when its features are there."""


def job_of(usage: Usage) -> Job:
    """What a usage file tells."""
    names = ("kind", "job", "run", "manifest", "adapter", "experiment", "team", "at_ns")
    return Job(**{name: getattr(usage, name) for name in names})


def merged(jobs: Iterable[Job]) -> list[Job]:
    """One for each run, with all that is known of it; the oldest first.

    Runs are the same when kind, name and id are. One without an id is told by its manifest and adapter.
    """
    found: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        name = (job.kind, job.job, job.run or f"{job.manifest} {job.adapter}")
        there = found.get(name)
        if there is None:
            found[name] = job
        else:
            known = {one.name: getattr(there, one.name) for one in fields(Job)}
            unknown = {one: getattr(job, one) for one, value in known.items() if not value}
            found[name] = replace(there, **unknown)
    return sorted(found.values(), key=lambda job: (job.at_ns, job.kind, job.job))


def count_clips(manifest: Manifest, first: int = 10) -> ClipCount:
    """What a manifest holds, with the first names."""
    names = sorted({row.source for row in manifest.rows})
    return ClipCount(
        clips=len(names),
        streams=len(manifest.ready()),
        set_aside=len(manifest.set_aside()),
        first=tuple(names[:first]),
    )


def rows_of_clip(store: Store, names: Collection[str], media: Collection[str]) -> Iterator[ClipRow]:
    """Rows of every manifest of a store whose source is one of `names` or whose media has one of these SHA-256.

    A name is that of a source, or its last part (`clip.mp4` for `set/clip.mp4`). Manifests are read one at a time, and
    only some columns; one that cannot be read is passed over.
    """
    columns = ["source", "stream", "media_sha256", "reason"]
    for path in store.list(MANIFESTS):
        try:
            file = pq.ParquetFile(io.BytesIO(store.read(path)), page_checksum_verification=True)
            table = file.read(columns=columns)
        except (pa.ArrowException, OSError):  # also FileNotFoundError: swept since it was listed
            continue
        source = table.column("source")
        last = pc.replace_substring_regex(source, r"^.*/", "")
        wanted = pa.array(sorted(names), pa.string())
        mask = pc.or_(pc.is_in(source, value_set=wanted), pc.is_in(last, value_set=wanted))
        shas = pa.array(sorted(media), pa.string())
        mask = pc.or_(mask, pc.is_in(table.column("media_sha256"), value_set=shas))
        digest = path.rpartition("/")[2].removesuffix(".parquet")
        for row in table.filter(mask).to_pylist():
            yield ClipRow(manifest=digest, **row)
