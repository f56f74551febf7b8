"""`crab cache pin`, `unpin`, `pins`: manifests that a project keeps; and the signing key of a zone."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS
from crab_platform.holding import FeaturesGone, pin_manifest, unpin_manifest
from crab_platform.pins import Pin, read_pins
from crab_platform.storage import Store
from jobs.caches import whoami
from jobs.output import finished_jobs, line, read_result, table
from jobs.run import JobFailed
from jobs.spec import SpecError

_PREFIX = 8
_HEX = set("0123456789abcdef")


def find_manifest(store: Store, what: str, runs: Path) -> str:
    """The digest that a person means: a digest, 8 or more of its first digits, or the name of a preprocess job.

    Raises SpecError when there is none, or there are several.
    """
    if len(what) == 64 and set(what) <= _HEX:
        return what
    result = read_result(runs / what)
    if result is not None and "manifest" in result:
        return str(result["manifest"])
    if len(what) >= _PREFIX and set(what) <= _HEX:
        digests = [
            path.rpartition("/")[2].removesuffix(".parquet") for path in store.list(MANIFESTS)
        ]
        found = [digest for digest in digests if digest.startswith(what)]
        if len(found) == 1:
            return found[0]
        if found:
            raise SpecError(f"{len(found)} manifests of {store.url} begin with {what}; give more")
    raise SpecError(
        f"{what!r} is no manifest of {store.url} and no job in {runs} ({finished_jobs(runs, 'manifest', what)}); give "
        f"a digest, at least {_PREFIX} of its first digits, or the name of a preprocess job"
    )


def pin(
    cache: FeatureCache,
    place: str,
    what: str,
    runs: Path,
    *,
    project: str,
    name: str | None,
    reason: str,
) -> dict[str, Any]:
    """Pins a manifest, shows it, and returns what `--json` prints. `place` is the cache as it was asked for."""
    digest = find_manifest(cache.store, what, runs)
    if name is None:
        name = what if (runs / what).is_dir() else digest[:12]
    wanted = Pin(project=project, name=name, manifest=digest, reason=reason, by=whoami())
    try:
        found = pin_manifest(cache, wanted)
    except FileNotFoundError as error:
        raise SpecError(
            f"the cache {cache.store.url} has no manifest {digest}; was it made in another cache?"
        ) from error
    except FeaturesGone as error:
        raise JobFailed(str(error)) from error
    line(
        f"{found.project}/{found.name} keeps manifest {digest} until: "
        f"crab cache unpin {place} {found.project}/{found.name}"
    )
    return vars(found)


def unpin(cache: FeatureCache, what: str) -> dict[str, Any]:
    """Ends a pin PROJECT/NAME. Raises SpecError for anything else, ValueError when there is none."""
    project, slash, name = what.partition("/")
    if not slash or not name:
        raise SpecError(f"{what!r}: expected PROJECT/NAME, as `crab cache pins` shows them")
    found = unpin_manifest(cache, project, name)
    line(
        f"{what} is gone; garbage collection may take what nobody else needs of manifest {found.manifest}"
    )
    return vars(found)


def pins(cache: FeatureCache) -> list[dict[str, Any]]:
    """Every pin of every project."""
    found = read_pins(cache.store)
    table(
        f"{cache.store.url}: {len(found)} pins",
        ("pin", "manifest", "by", "since", "reason"),
        [
            (
                f"{pin.project}/{pin.name}",
                pin.manifest[:12],
                pin.by,
                f"{datetime.fromtimestamp(pin.at_ns / 1e9):%Y-%m-%d}",
                pin.reason,
            )
            for pin in found
        ],
    )
    return [vars(pin) for pin in found]
