"""Leases: what live jobs need, so that garbage collection leaves it alone.

    leases/<holder>/<number>.json

A lease is renewed by writing the next number and deleting the one before. A listing that runs
while that happens finds at least one of the two: numbers of a holder only grow, and listings go in
the order of names. A lease names manifests whose features are needed, and, for a job that looks up
and commits, which condemned sets its index left out (`seen`): all others must wait for it.

A lease is dead when it was not renewed for its time to live and the most that two clocks may
differ. Its holder gives up long before that, so that the two never disagree.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from crab_platform.clock import SYSTEM, Clock
from crab_platform.storage import Store, StoreError

LEASES = "leases"
TTL_S = 1800.0
RENEW_S = 300.0
FENCE_S = 1350.0
"""A holder that could not renew for so long stops: three quarters of its time to live, as restic does
(reference/reliability.md 1.1)."""
SKEW_S = 1200.0
"""Two clocks, each ten minutes off, in opposite directions."""


class LeaseLost(Exception):  # noqa: N818 (the condition)
    """A job could not renew its lease in time: what it found in the cache may be gone by now."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """One lease as it was last written."""

    holder: str
    job: str
    by: str
    renewed_ns: int
    ttl_s: float
    manifests: tuple[str, ...] = ()
    seen: tuple[str, ...] | None = None
    """Condemned sets that the job's index left out; None for a job that only reads its manifests."""

    def is_dead(self, now_ns: int) -> bool:
        """Whether nobody can hold it any more, whatever the clocks of writer and reader say."""
        return now_ns - self.renewed_ns > (self.ttl_s + SKEW_S) * 1e9


class LeaseHolder:
    """Takes a lease, renews it and gives it back. One thread at a time may use it, but `keep` may run beside."""

    def __init__(self, store: Store, job: str, by: str = "", *, clock: Clock = SYSTEM) -> None:
        self._store = store
        self._clock = clock
        self._number = 0
        self._paths: list[str] = []
        self._renewed_s = clock.monotonic()
        self._lock = threading.Lock()
        self._is_lost = False
        self._is_over = False
        self.lease = Lease(holder=clock.new_id(), job=job, by=by, renewed_ns=0, ttl_s=TTL_S)

    def renew(self, **changes: Any) -> None:
        """Writes the lease with the time of now and these fields changed; the first time takes it.

        Raises LeaseLost when the lease was not renewed for FENCE_S before this write was done, or was given back.
        """
        with self._lock:
            if self._is_over:
                raise LeaseLost(
                    f"the lease of job {self.lease.job!r} was given back; take a new one"
                )
            if self._is_lost:
                raise self._lost(self._renewed_s)
            started_s, before_s = self._clock.monotonic(), self._renewed_s
            lease = replace(self.lease, renewed_ns=self._clock.time_ns(), **changes)
            self._number += 1
            path = f"{LEASES}/{lease.holder}/{self._number:08d}.json"
            # Kept before it is tried: an attempt that seemed to fail may have arrived.
            before = list(self._paths)
            self._paths.append(path)
            self._store.create(path, json.dumps(vars(lease), sort_keys=True).encode())
            self.lease = lease
            if before and self._clock.monotonic() - before_s > FENCE_S:
                self._is_lost = True
            if self._is_lost:
                raise self._lost(before_s)
            self._renewed_s = started_s
            for old in before:
                self._store.delete(old)
            self._paths = [path]

    def check(self) -> None:
        """Raises LeaseLost when the lease was not renewed for FENCE_S."""
        if self._is_lost or self._clock.monotonic() - self._renewed_s > FENCE_S:
            raise self._lost(self._renewed_s)

    def release(self) -> None:
        """Gives the lease back."""
        with self._lock:
            self._is_over = True
            for path in self._paths:
                self._store.delete(path)
            self._paths = []

    def leave(self, ttl_s: float, manifests: Sequence[str]) -> None:
        """The last renewal: the manifests are kept for `ttl_s` more seconds, and nobody renews any more."""
        self.renew(ttl_s=ttl_s, manifests=tuple(manifests), seen=None)
        with self._lock:
            self._is_over = True
            self._paths = []

    def _lost(self, since_s: float) -> LeaseLost:
        spent = self._clock.monotonic() - since_s
        return LeaseLost(
            f"the lease of job {self.lease.job!r} in {self._store.url} was not renewed for {spent:.0f} s, so garbage "
            "collection may have taken what the job found; start the same command again, what is there is found"
        )


@contextmanager
def kept(holders: Sequence[LeaseHolder]) -> Iterator[None]:
    """Renews leases that were taken, every RENEW_S in a thread of its own, for as long as the block lasts.

    A store that does not answer is asked again at the next turn; `check` tells when it was too long.
    """
    done = threading.Event()

    def run() -> None:
        while not done.wait(RENEW_S):
            for holder in holders:
                # What was missed for too long is told by `check`, in the job's own thread.
                with suppress(StoreError, LeaseLost):
                    holder.renew()

    thread = threading.Thread(target=run, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def read_leases(store: Store) -> list[tuple[list[str], Lease]]:
    """(paths, lease) of every holder, as last written; dead ones too. More than one path where a renewal was cut off.

    Raises ValueError for a file that is no lease: to ignore one could delete what somebody needs.
    """
    listed: dict[str, list[str]] = {}
    for path in store.list(LEASES):
        listed.setdefault(path.rpartition("/")[0], []).append(path)
    found = []
    for folder, paths in listed.items():
        for _ in range(20):
            try:
                # Sorted: the highest number is the last.
                found.append((paths, _parse(store, paths[-1], store.read(paths[-1]))))
                break
            except FileNotFoundError:  # renewed or given back since it was listed
                paths = store.list(folder)
                if not paths:
                    break
        else:
            raise StoreError(f"{store.url}/{folder} changes faster than it can be read; try again")
    return found


def _parse(store: Store, path: str, data: bytes) -> Lease:
    try:
        fields = json.loads(data)
        seen = fields["seen"]
        return Lease(
            holder=str(fields["holder"]),
            job=str(fields["job"]),
            by=str(fields["by"]),
            renewed_ns=int(fields["renewed_ns"]),
            ttl_s=float(fields["ttl_s"]),
            manifests=tuple(map(str, fields["manifests"])),
            seen=None if seen is None else tuple(map(str, seen)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{store.url}/{path} is no lease ({error!r}); have somebody look at it, then delete it"
        ) from error
