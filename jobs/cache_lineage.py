"""`crab cache lineage`: adapter -> run -> manifest -> clips, and back, from any of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS, CorruptManifest, read_manifest
from crab_platform.identity import sha256_file
from crab_platform.lineage import ClipCount, ClipRow, Job, count_clips, job_of, merged, rows_of_clip
from crab_platform.usage import read_usage
from jobs.output import RESULT, line, table
from jobs.spec import SpecError

_HEX = set("0123456789abcdef")
_PREFIX = 8


@dataclass(kw_only=True)
class Lineage:
    """What belongs to what somebody asked about."""

    what: str
    is_a: str
    """adapter, run, manifest or clip."""
    jobs: list[Job] = field(default_factory=list)
    """That made or used the manifests, the oldest first."""
    manifests: dict[str, ClipCount | None] = field(default_factory=dict)
    """None for one whose cache is not known, or which is not there any more."""
    clip_rows: list[ClipRow] = field(default_factory=list)
    """Of a clip that was asked about."""


def lineage(what: str, caches: Iterable[FeatureCache], runs: Path, first: int = 10) -> Lineage:
    """Finds out what `what` is, and what belongs to it. Raises SpecError when nothing of that name is known."""
    stores = list(caches)
    usages = (job_of(usage) for cache in stores for usage in read_usage(cache.store))
    jobs = merged([*_jobs_of_runs(runs), *usages])
    found = (
        _of_adapter(what, jobs)
        or _of_run(what, jobs)
        or _of_manifest(what, jobs, stores)
        or _of_clip(what, jobs, stores)
    )
    if found is None:
        raise SpecError(
            f"{what!r} is no adapter, run, manifest or clip that {runs}"
            + "".join(f" or {cache.store.url}" for cache in stores)
            + " knows; give the folder of an adapter, the name or MLflow id of a run, a manifest's digest, or a clip "
            "by name, path or SHA-256, and its cache with --cache"
        )
    for digest in found.manifests:
        found.manifests[digest] = _count(digest, stores, first)
    return found


def caches_of_runs(runs: Path) -> list[str]:
    """URLs of the caches that finished preprocess jobs filled: where to look when no cache is given."""
    urls = {str(result["cache"]) for _, result in _results(runs) if "cache" in result}
    return sorted(urls)


def show(found: Lineage) -> None:
    """The same for people."""
    line(f"{found.what} is a{'n' if found.is_a[0] in 'aeiou' else ''} {found.is_a}")
    adapters = [job for job in found.jobs if job.adapter or job.adapter_folder]
    if adapters:
        table(
            "adapters",
            ("adapter", "digest", "job", "what", "manifest"),
            [
                (job.adapter_folder, job.adapter[:12], job.job, _DID[job.kind], job.manifest[:12])
                for job in adapters
            ],
        )
    table(
        "runs",
        ("kind", "job", "run", "team", "when", "manifest"),
        [
            (job.kind, job.job, job.run, job.team, _when(job.at_ns), job.manifest[:12])
            for job in found.jobs
        ],
    )
    for digest, count in found.manifests.items():
        if count is None:
            line(f"manifest {digest}: not found; give its cache with --cache")
            continue
        line(
            f"manifest {digest}: {count.clips} clips, {count.streams} streams with features, {count.set_aside} set "
            "aside"
        )
        if not found.clip_rows:
            more = f" ... and {count.clips - len(count.first)} more"
            line("  " + ", ".join(count.first) + (more if count.clips > len(count.first) else ""))
    if found.clip_rows:
        table(
            "the clip in manifests",
            ("manifest", "name", "stream", "media", "set aside"),
            [
                (row.manifest[:12], row.source, row.stream, row.media_sha256[:12], row.reason)
                for row in found.clip_rows
            ],
        )


def record(found: Lineage) -> dict[str, Any]:
    """What `--json` prints."""
    return asdict(found)


_DID = {"train": "made it", "evaluate": "scored it", "preprocess": ""}


def _of_adapter(what: str, jobs: list[Job]) -> Lineage | None:
    folder = Path(what)
    digest, told = "", ""
    if (folder / "crab.json").is_file():
        from jobs.adapters import adapter_digest, read_record  # loads torch

        digest, told = adapter_digest(folder), str(read_record(folder)["lineage"].get("manifest"))
    elif not _is_digest(what) or all(job.adapter != what for job in jobs):
        return None
    else:
        digest = what
    own = [
        job
        for job in jobs
        if job.adapter == digest
        or (job.adapter_folder and Path(job.adapter_folder).absolute() == folder.absolute())
    ]
    manifests = {job.manifest for job in own if job.manifest} | ({told} if told else set())
    return _around("adapter", what, own, manifests, jobs)


def _of_run(what: str, jobs: list[Job]) -> Lineage | None:
    own = [job for job in jobs if what in (job.job, job.run) or _begins(job.run, what)]
    if not own:
        return None
    adapters = {job.adapter for job in own if job.adapter}
    made = [job for job in jobs if job.adapter in adapters and job not in own]
    return _around("run", what, [*own, *made], {job.manifest for job in own if job.manifest}, jobs)


def _of_manifest(what: str, jobs: list[Job], caches: list[FeatureCache]) -> Lineage | None:
    known = {job.manifest for job in jobs if job.manifest}
    for cache in caches:
        known |= {
            path.rpartition("/")[2].removesuffix(".parquet") for path in cache.store.list(MANIFESTS)
        }
    found = {digest for digest in known if _begins(digest, what)}
    if not found:
        return None
    return _around("manifest", what, [job for job in jobs if job.manifest in found], found, jobs)


def _of_clip(what: str, jobs: list[Job], caches: list[FeatureCache]) -> Lineage | None:
    names, media = {what}, {what} if _is_digest(what) else set()
    path = Path(what)
    if path.is_file():
        # The name in a manifest is that of its data set; the bytes say which clip it is.
        names = set()
        with path.open("rb") as file:
            media = {sha256_file(file)}
    rows = list({row for cache in caches for row in rows_of_clip(cache.store, names, media)})
    if not rows:
        return None
    digests = {row.manifest for row in rows}
    found = _around("clip", what, [job for job in jobs if job.manifest in digests], digests, jobs)
    found.clip_rows = sorted(rows, key=lambda row: (row.manifest, row.source, row.stream))
    return found


def _around(is_a: str, what: str, own: list[Job], manifests: set[str], jobs: list[Job]) -> Lineage:
    """`own` jobs, and those that made the manifests."""
    made = [
        job
        for job in jobs
        if job.kind == "preprocess" and job.manifest in manifests and job not in own
    ]
    return Lineage(
        what=what,
        is_a=is_a,
        jobs=sorted([*made, *own], key=lambda job: (job.at_ns, _ORDER.get(job.kind, 9), job.job)),
        manifests=dict.fromkeys(sorted(manifests)),
    )


_ORDER = {"preprocess": 0, "train": 1, "evaluate": 2}


def _jobs_of_runs(runs: Path) -> Iterator[Job]:
    """Finished jobs, from result.json of each run's folder."""
    for path, result in _results(runs):
        if result.get("job") not in _ORDER or "manifest" not in result:
            continue
        folder, digest = str(result.get("adapter", "")), ""
        if folder and (Path(folder) / "crab.json").is_file():
            from jobs.adapters import adapter_digest  # loads torch

            digest = adapter_digest(Path(folder))
        yield Job(
            kind=str(result["job"]),
            job=str(result["name"]),
            run=str(result.get("mlflow_run", "")),
            manifest=str(result["manifest"]),
            adapter=digest,
            adapter_folder=folder,
            at_ns=path.stat().st_mtime_ns,
        )


def _results(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(runs.glob(f"*/{RESULT}")):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError):  # not ours, or gone since it was listed
            continue
        if isinstance(result, dict):
            yield path, result


def _count(digest: str, caches: list[FeatureCache], first: int) -> ClipCount | None:
    for cache in caches:
        try:
            return count_clips(read_manifest(cache.store, digest), first)
        except (FileNotFoundError, CorruptManifest, ValueError):
            continue
    return None


def _begins(whole: str, start: str) -> bool:
    return len(start) >= _PREFIX and set(start) <= _HEX and whole.startswith(start)


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= _HEX


def _when(at_ns: int) -> str:
    return f"{datetime.fromtimestamp(at_ns / 1e9):%Y-%m-%d %H:%M}" if at_ns else ""
