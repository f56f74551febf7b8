"""How jobs and people keep what they need from garbage collection, in the order that makes it safe.

The order is always: first write that it is needed (a lease, a pin), then look whether it is being
deleted already. The sweep does it the other way round: first the mark, then it reads leases and
pins. So at least one of the two sees the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from crab_platform import condemned
from crab_platform.cache import FeatureCache
from crab_platform.catalog import (
    Manifest,
    ManifestRow,
    build_manifest,
    put_manifest,
    read_manifest,
)
from crab_platform.commits import PACKS
from crab_platform.leases import LeaseHolder
from crab_platform.packs import Entry
from crab_platform.pins import Pin, read_pins, remove_pin, write_pin
from crab_platform.quarantine import read_quarantine
from crab_platform.storage import Store, StoreError, StoreRefused

KEEP_S = 14 * 86400.0
"""How long a manifest is kept after the job that made it, unless somebody pins it."""
_TURNS = 60
_TURN_S = 10.0


class FeaturesGone(Exception):  # noqa: N818 (the condition)
    """Features that a manifest names are deleted, or are being deleted."""


@dataclass(frozen=True, kw_only=True)
class JobHold:
    """The leases of a job that looks up and commits: one in its cache, one in each layer below."""

    cache: FeatureCache
    own: LeaseHolder
    layers: Mapping[str, LeaseHolder]
    """By the URL of the store."""
    not_held: tuple[str, ...]
    """Layers that take no lease from us. What is used of them must be copied: their owner may delete it."""
    exclude: Mapping[str, set[str]]
    """What an index must leave out, for `FeatureCache.index`."""

    @property
    def holders(self) -> list[LeaseHolder]:
        """All leases, to be renewed."""
        return [self.own, *self.layers.values()]

    def check(self) -> None:
        """Raises LeaseLost when one of the leases was not renewed for too long."""
        for holder in self.holders:
            holder.check()

    def release(self) -> None:
        """Gives all leases back: the job ended without a manifest."""
        _give_back(self.holders)


def hold_job(cache: FeatureCache, job: str, by: str = "") -> JobHold:
    """Leases for a job that starts, and what its index must leave out. Load the index after this, never before."""
    exclude: dict[str, set[str]] = {}
    layers: dict[str, LeaseHolder] = {}
    not_held: list[str] = []
    own = LeaseHolder(cache.store, job, by, clock=cache.clock)
    try:
        exclude[cache.store.url] = _take(own, cache)
        for store in cache.layers:
            holder = layers[store.url] = LeaseHolder(store, job, by, clock=cache.clock)
            try:
                exclude[store.url] = _take(holder, cache, store.url)
            except StoreRefused:  # read-only for us, as another team's cache may well be
                not_held.append(store.url)
                _give_back([layers.pop(store.url)])
    except BaseException:
        _give_back([own, *layers.values()])
        raise
    return JobHold(cache=cache, own=own, layers=layers, not_held=tuple(not_held), exclude=exclude)


def _give_back(holders: Iterable[LeaseHolder]) -> None:
    """Each of them, whatever a store says to it: a lease that cannot be given back dies by itself."""
    for holder in holders:
        with suppress(StoreError):
            holder.release()


def _take(holder: LeaseHolder, cache: FeatureCache, layer: str = "") -> set[str]:
    store = cache.store_of(layer)
    holder.renew(seen=())
    seen, paths = condemned.left_out(store)
    holder.renew(seen=seen)
    return paths


def publish_manifest(
    hold: JobHold, rows: Iterable[ManifestRow], *, keep_s: float = KEEP_S
) -> Manifest:
    """Writes the manifest of a job that ends, and leaves a lease on it for `keep_s`.

    Raises LeaseLost when the job was cut off for so long that its features may be gone, and
    FeaturesGone when a collection that was killed stands in the way.
    """
    manifest = build_manifest(rows)
    used = {row.entry.layer for row in manifest.rows if row.entry is not None and row.entry.layer}
    written = manifest
    for layer, holder in {"": hold.own, **hold.layers}.items():
        store = hold.cache.store_of(layer)
        if layer and layer not in used:
            holder.release()
            continue
        holder.renew(manifests=(manifest.digest,))
        found = _write_for_good(hold.cache, store, manifest, holder)
        if not layer:
            written = found
        holder.leave(keep_s, [manifest.digest])
    return written


def _write_for_good(
    cache: FeatureCache, store: Store, manifest: Manifest, holder: LeaseHolder | None = None
) -> Manifest:
    """Writes a manifest that was leased or pinned before, and makes sure that it stays.

    One of the same content may be on its way out; then it is waited for, and written again.

    In a layer, too, its rows name places as this job sees them: garbage collection asks for keys and digests only,
    and to readers places are hints (manifest_reader.py).
    """
    for _ in range(_TURNS):
        try:
            found = put_manifest(store, manifest)
            if manifest.path not in condemned.left_out(store)[1] and store.exists(manifest.path):
                return found
        except FileNotFoundError:  # it was there, and was deleted before it could be read
            continue
        if holder is not None:
            holder.renew()
        cache.clock.sleep(_TURN_S)
    raise FeaturesGone(
        f"{store.url}/{manifest.path} is being deleted by a garbage collection that does not end: run "
        f"`crab cache gc {store.url} --apply`, then start the same command again"
    )


def hold_manifest(
    cache: FeatureCache, manifest: Manifest, job: str, by: str = ""
) -> list[LeaseHolder]:
    """Leases on a manifest for a job that reads its features, in its cache and in the layers where they lie.

    Raises FeaturesGone when they are deleted, or about to be.
    """
    holders: list[LeaseHolder] = []
    try:
        for store in _stores(cache, manifest):
            holder = LeaseHolder(store, job, by, clock=cache.clock)
            holders.append(holder)
            try:
                holder.renew(manifests=(manifest.digest,))
                _write_for_good(cache, store, manifest, holder)
            except StoreRefused:  # we may only read it: its owners' pins must hold what we use
                _give_back([holders.pop()])
        check_present(cache, manifest)
    except BaseException:
        _give_back(holders)
        raise
    return holders


def pin_manifest(cache: FeatureCache, pin: Pin) -> Pin:
    """Pins a manifest of a cache, and in the layers where its features lie.

    Raises FileNotFoundError when there is no such manifest, FeaturesGone when some of its features
    are deleted, or about to be. The pin stands all the same, since somebody else may have been
    promised the same one: it holds what is left, and what is computed again.
    """
    manifest = read_manifest(cache.store, pin.manifest)
    for store in _stores(cache, manifest):
        pin = write_pin(store, pin, clock=cache.clock)
        _write_for_good(cache, store, manifest)
    check_present(cache, manifest)
    return pin


def unpin_manifest(cache: FeatureCache, project: str, name: str) -> Pin:
    """Ends a pin, here and in the layers below where it stands for the same manifest; returns it.

    Raises ValueError when there is no such pin.
    """
    pin = remove_pin(cache.store, project, name)
    for store in cache.layers:
        # Only our own: another team may have a pin of the same name there.
        if pin in read_pins(store):
            remove_pin(store, project, name)
    return pin


def check_present(cache: FeatureCache, manifest: Manifest) -> None:
    """Raises FeaturesGone unless every feature of a manifest is there, at its place or at another."""
    entries = [row.entry for row in manifest.ready() if row.entry is not None]
    layers = {entry.layer for entry in entries if cache.reads(entry.layer)}
    there: dict[str, set[str]] = {}
    going: set[str] = set()
    for layer in layers:
        store = cache.store_of(layer)
        leaving = condemned.left_out(store)[1]
        there[layer] = set(store.list(PACKS)) - leaving
        going |= leaving
    bad = {
        (layer, taken.key, taken.commit)
        for layer in layers
        for _, taken in read_quarantine(cache.store_of(layer), cache.trust)
    }
    moved = [
        entry
        for entry in entries
        if entry.pack not in there.get(entry.layer, ())
        or (entry.layer, entry.key, entry.commit) in bad
    ]
    # A condemned commit takes its pack along.
    suspects = entries if going else moved
    if not suspects:
        return
    lost = [entry for entry, copies in _copies(cache, suspects) if not copies]
    if lost:
        unread = sorted({entry.layer for entry in lost if not cache.reads(entry.layer)})
        lay = (
            f", or lay in {', '.join(unread)}, which this job does not read (add it to cache.read_through of the spec)"
            if unread
            else ""
        )
        raise FeaturesGone(
            f"{len(lost)} of {len(entries)} features of manifest {manifest.digest[:12]} are deleted, or about to be"
            f"{lay}; run its preprocess job again (it computes only these), and pin what you want to keep: "
            "`crab cache pin`"
        )


def _stores(cache: FeatureCache, manifest: Manifest) -> list[Store]:
    """The cache's own store, and those of the layers where features of a manifest lie.

    These are the layers that it names. For features of one that is not read, it is the layer of their first copy.
    """
    entries = [row.entry for row in manifest.rows if row.entry is not None]
    named = {entry.layer for entry in entries}
    unread = [entry for entry in entries if not cache.reads(entry.layer)]
    if unread:
        named |= {copies[0].layer for _, copies in _copies(cache, unread) if copies}
    return [cache.store, *(store for store in cache.layers if store.url in named)]


def _copies(cache: FeatureCache, entries: Iterable[Entry]) -> Iterator[tuple[Entry, list[Entry]]]:
    """Each entry with all that have the same key and digest, without those that are being deleted."""
    exclude = {store.url: condemned.left_out(store)[1] for store in (cache.store, *cache.layers)}
    index = cache.index(exclude)
    for entry in entries:
        yield entry, [copy for copy in index.copies(entry.key) if copy.blake3 == entry.blake3]
