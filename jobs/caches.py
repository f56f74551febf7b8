"""The cache of a spec: opened, held while a job reads it, and told afterwards what the job took from it."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest
from crab_platform.commits import NOBODY, Writer
from crab_platform.holding import hold_manifest
from crab_platform.leases import kept
from crab_platform.local_tier import LocalTier
from crab_platform.storage import StoreError, StoreUnreachable, open_store
from crab_platform.trust import Signer, Trust
from crab_platform.usage import Usage, write_usage
from jobs.output import line
from jobs.spec import EvaluateSpec, TrainSpec
from jobs.spec_cache import SIGNING_KEY_VARIABLE, Cache
from jobs.spec_errors import SpecError


def open_cache(cache: Cache, writer: Writer = NOBODY) -> FeatureCache:
    """The cache of a spec. Touches no store; raises SpecError when it signs and has no key, or another zone's."""
    signer = None
    if cache.zone:
        key_file = os.environ.get(SIGNING_KEY_VARIABLE)
        if not key_file:
            raise SpecError(
                f"cache.zone is {cache.zone!r}, but {SIGNING_KEY_VARIABLE} does not name the file of its private key; "
                "make one with `crab cache keygen FILE`"
            )
        signer = Signer(cache.zone, os.path.abspath(key_file))
        # Read now: a job would find out in its workers, and nobody takes what another key signed.
        if signer.public_key != cache.trust.get(cache.zone, signer.public_key):
            raise SpecError(
                f"{key_file} is not the private key of cache.zone {cache.zone!r}: its public key is "
                f"{signer.public_key}, cache.trust says {cache.trust[cache.zone]}"
            )
    return FeatureCache(
        open_store(cache.url),
        writer=writer,
        signer=signer,
        trust=Trust(cache.trust),
        layers=[open_store(url) for url in cache.read_through],
        local=LocalTier(cache.local.folder, int(cache.local.max_gb * 1e9)) if cache.local else None,
    )


def check_sees_what_it_writes(cache: Cache) -> None:
    """Raises SpecError when a job that writes would not take what it wrote, and compute it again each time."""
    if cache.trust and cache.zone not in cache.trust:
        signs = f"signs as {cache.zone!r}" if cache.zone else "signs nothing"
        raise SpecError(
            f"cache.trust takes only {', '.join(sorted(cache.trust))}, and the job {signs}: it would not see what it "
            "writes, and compute it again each time; set cache.zone to one of cache.trust"
        )


@contextmanager
def held(cache: Cache, manifest: Manifest, job: str) -> Iterator[None]:
    """Keeps garbage collection away from the features of a manifest while the block lasts.

    Raises FeaturesGone when they are deleted, or about to be.
    """
    holders = hold_manifest(open_cache(cache), manifest, job, whoami())
    try:
        with kept(holders):
            yield
    finally:
        for holder in holders:
            # A lease that cannot be given back dies by itself.
            with suppress(StoreError):
                holder.release()


def record_usage(cache: Cache, usage: Usage) -> None:
    """Writes what a job took from a cache and gave to it; a cache that we may only read does not learn of it."""
    try:
        write_usage(open_store(cache.url), usage)
    except StoreUnreachable as error:
        line(f"what this job used is not in the cache's records: {error}")


def record_reading(
    kind: Literal["train", "evaluate"],
    spec: TrainSpec | EvaluateSpec,
    run: str,
    manifest: Manifest,
    adapter: str,
) -> None:
    """Writes that a run read the features of a manifest, and which adapter it made or used."""
    cache = spec.features.cache
    usage = Usage(
        kind=kind,
        job=spec.name,
        run=run,
        experiment=spec.tracking.experiment,
        team=cache.team,
        manifest=manifest.digest,
        adapter=adapter,
    )
    record_usage(cache, usage)


def whoami() -> str:
    """User and machine, for leases and pins."""
    return f"{getpass.getuser()}@{socket.gethostname()}"
