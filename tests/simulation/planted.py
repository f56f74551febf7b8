"""Bugs to be found: each replaces, from outside and for a while, one thing that the product does right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from simulation import network

from crab_platform import cache, condemned, holding, packs
from crab_platform.catalog import write_manifest
from crab_platform.garbage import Collector, Roots
from crab_platform.leases import Lease, LeaseHolder

Plant = Callable[[ExitStack], None]


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.enter_context(patch.object(owner, name, value))


def commit_before_pack(stack: ExitStack) -> None:
    """An entry exists before its features do."""

    def publish(store: Any, pack: Any, commit: Any, **_: Any) -> None:
        store.create(commit.path, commit.data)
        store.create(pack.path, pack.data)

    _set(stack, cache, "publish_pack_then_commit", publish)


def sweep_ignores_leases(stack: ExitStack) -> None:
    """Only pins keep anything."""
    real = Collector.roots

    def roots(self: Collector) -> Roots:
        return replace(real(self), leases=())

    _set(stack, Collector, "roots", roots)


def sweep_ignores_pins(stack: ExitStack) -> None:
    """Only leases keep anything."""
    real = Collector.roots

    def roots(self: Collector) -> Roots:
        return replace(real(self), pins=())

    _set(stack, Collector, "roots", roots)


def leases_read_before_the_mark(stack: ExitStack) -> None:
    """The order in which both sides may miss each other."""
    real = Collector.sweep

    def sweep(self: Collector, *arguments: Any, **options: Any) -> None:
        known = self.roots()
        self.roots = lambda: known  # type: ignore[method-assign]
        try:
            real(self, *arguments, **options)
        finally:
            del self.roots

    _set(stack, Collector, "sweep", sweep)


def packs_deleted_before_commits(stack: ExitStack) -> None:
    """For a moment, or for ever after a crash, entries exist without features."""
    real = Collector._delete

    def delete(self: Collector, doomed: dict[str, str], on_progress: Any) -> None:
        last = {path: why for path, why in doomed.items() if path.startswith("commits/")}
        real(self, {path: why for path, why in doomed.items() if path not in last}, on_progress)
        real(self, last, on_progress)

    _set(stack, Collector, "_delete", delete)


def leases_die_without_allowance(stack: ExitStack) -> None:
    """As if all clocks agreed."""
    _set(
        stack,
        Lease,
        "is_dead",
        lambda self, now_ns: now_ns - self.renewed_ns > self.ttl_s * 1e9,
    )


def index_keeps_what_is_swept(stack: ExitStack) -> None:
    """A job says that it leaves a set out, and does not."""
    real = condemned.left_out
    _set(stack, condemned, "left_out", lambda store: (real(store)[0], set()))


def lost_answer_taken_for_a_conflict(stack: ExitStack) -> None:
    """The second attempt finds the first one's file, and gives up."""
    real = network.create_with_retries
    _set(
        stack,
        network,
        "create_with_retries",
        lambda put, holds, **options: real(put, lambda: False, **options),
    )


def digest_not_checked(stack: ExitStack) -> None:
    """Whatever lies at the place is taken."""
    real = cache.open_entry

    def open_entry(entry: Any, data: Any) -> Any:
        found = packs._digest(entry.key, entry.tensors, [memoryview(data)])
        return real(replace(entry, blake3=found), data)

    _set(stack, cache, "open_entry", open_entry)


def sweep_does_not_look_again(stack: ExitStack) -> None:
    """What was garbage when it was condemned is deleted, needed again or not."""
    real = Collector.decide

    def decide(self: Collector, *arguments: Any) -> Any:
        self.needed = lambda roots, table, report: set()  # type: ignore[method-assign]  # planted
        try:
            return real(self, *arguments)
        finally:
            del self.needed

    _set(stack, Collector, "decide", decide)


class _Unlike(str):
    """A name that is like no other."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def manifest_not_looked_at_again(stack: ExitStack) -> None:
    """A manifest that is being deleted is taken for one that stays."""
    _set(
        stack,
        holding,
        "_write_for_good",
        lambda cache, store, manifest, holder=None: write_manifest(store, manifest.rows),
    )


def quarantine_not_read(stack: ExitStack) -> None:
    """Entries that were taken back are used."""
    _set(stack, cache, "read_quarantine", lambda store, trust: ())


def lease_renewed_by_delete_and_create(stack: ExitStack) -> None:
    """For a moment there is no lease."""
    real = LeaseHolder.renew

    def renew(self: LeaseHolder, **changes: Any) -> None:
        for path in list(self._paths):
            self._store.delete(path)
        real(self, **changes)

    _set(stack, LeaseHolder, "renew", renew)


def job_looks_before_it_leases(stack: ExitStack) -> None:
    """A job lists what is being swept, and takes its lease afterwards."""

    def take(holder: LeaseHolder, cache: Any, layer: str = "") -> set[str]:
        seen, paths = condemned.left_out(cache.store_of(layer))
        index = cache.index({cache.store.url: paths})
        holder.renew(seen=seen)
        cache.index = lambda exclude=None: index
        return paths

    _set(stack, holding, "_take", take)


BUGS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        commit_before_pack,
        sweep_ignores_leases,
        sweep_ignores_pins,
        leases_read_before_the_mark,
        packs_deleted_before_commits,
        leases_die_without_allowance,
        index_keeps_what_is_swept,
        lost_answer_taken_for_a_conflict,
        digest_not_checked,
        sweep_does_not_look_again,
        manifest_not_looked_at_again,
        quarantine_not_read,
        lease_renewed_by_delete_and_create,
        job_looks_before_it_leases,
    )
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """One of BUGS while the block lasts; none for None."""
    with ExitStack() as stack:
        if name is not None:
            BUGS[name](stack)
        yield
