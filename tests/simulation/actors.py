"""What processes do in a history: each a short program over the real cache code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from simulation.ledger import Ledger, Promise, Work, contents_of
from simulation.network import SimStore
from simulation.samples import ENTRIES, KEYS, VARIANTS, is_true, number_of
from simulation.world import Process

import crab_platform.cache
from crab_platform import holding, leases, snapshots
from crab_platform.cache import FeatureCache, PublishTooSlow
from crab_platform.catalog import ManifestRow, read_manifest
from crab_platform.compaction import compact
from crab_platform.garbage import MIN_GRACE_S, CollectionRuns, Collector
from crab_platform.holding import FeaturesGone
from crab_platform.index import CacheIndex
from crab_platform.leases import LeaseLost
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import CorruptEntry, Entry
from crab_platform.pins import Pin, remove_pin
from crab_platform.quarantine import CORRUPT, BadEntry, write_quarantine
from crab_platform.storage import StoreError, StoreUnreachable

Program = Callable[[Process, Ledger], None]

HOUR_S = 3600.0


def cache_of(process: Process, ledger: Ledger) -> FeatureCache:
    clock = process.clock
    publish = partial(crab_platform.cache.publish_pack_then_commit, clock=clock)
    return FeatureCache(SimStore(ledger.network, process), publish=publish, clock=clock)


def count(process: Process, what: str) -> None:
    process.stats[what] = process.stats.get(what, 0) + 1


def load(process: Process, ledger: Ledger, cache: FeatureCache, exclude=None) -> CacheIndex:
    """An index, held against what was in quarantine before it was loaded."""
    taken_back = frozenset(ledger.taken_back)
    index = cache.index(exclude)
    ledger.looked_up(process.name, index.lookup(KEYS), taken_back)
    return index


def read(ledger: Ledger, cache: FeatureCache, entries: Sequence[Entry]) -> dict[int, CorruptEntry]:
    """Reads entries and checks what comes; returns the bad ones."""
    found, bad = cache.read_each(entries)
    for entry, arrays in zip(entries, found, strict=True):
        if arrays is not None and not is_true(entry.key, arrays):
            ledger.violate(f"clip {number_of(entry.key)} was read as {arrays['x'].tolist()}")
    return bad


def take_back(process: Process, store: SimStore, entries: Sequence[Entry]) -> None:
    """Puts entries into quarantine."""
    bad = [BadEntry(key=e.key, commit=e.commit, reason=CORRUPT) for e in entries]
    write_quarantine(store, bad, clock=process.clock)


def job(clips: Sequence[int], *, variant: int, stay_s: float, keep_s: float) -> Program:
    """A preprocess job: looks up, computes what is missing, writes its manifest."""

    def run(process: Process, ledger: Ledger) -> None:
        cache = cache_of(process, ledger)
        names = [KEYS[clip] for clip in clips]
        hold = holding.hold_job(cache, process.name)
        work = Work(process=process, holder=hold.own)
        try:
            with leases.kept(hold.holders):
                ledger.works.append(work)
                index = load(process, ledger, cache, hold.exclude)
                found = index.lookup(names)
                work.commits |= {entry.commit for entry in found.values()}
                bad = read(ledger, cache, list(found.values()))
                damaged = [list(found.values())[at] for at in bad]
                for entry in damaged:
                    if (entry.key, entry.blake3) not in ledger.tainted and work.stands():
                        ledger.violate(f"{process.name} cannot read what its index has: {entry}")
                hold.check()
                if damaged:
                    take_back(process, cache.store, damaged)
                missing = [n for n in clips if KEYS[n] not in found]
                missing += [number_of(entry.key) for entry in damaged]
                if stay_s:
                    process.world.wait(stay_s * process.world.rng.random())
                made: dict[str, Entry] = {}
                for start in range(0, len(missing), 2):
                    new = [ENTRIES[n][variant] for n in missing[start : start + 2]]
                    for entry in cache.commit(new):
                        made[entry.key] = entry
                        work.commits.add(entry.commit)
                if stay_s:
                    process.world.wait(stay_s * process.world.rng.random())
                index = load(process, ledger, cache, hold.exclude)
                winners = index.lookup(names)
                for key in names:
                    if key in winners:
                        continue
                    mine = made.get(key, found.get(key))
                    assert mine is not None
                    if (key, mine.blake3) in ledger.tainted or not work.stands():
                        continue
                    ledger.violate(
                        f"{process.name} committed clip {number_of(key)}, then it is gone"
                    )
                work.commits |= {entry.commit for entry in winners.values()}
                hold.check()
                rows = [
                    ManifestRow(
                        source=f"clip{number_of(key)}", stream="video", status="ready", entry=entry
                    )
                    for key, entry in winners.items()
                ]
                if not rows:
                    hold.release()
                    return
                manifest = holding.publish_manifest(hold, rows, keep_s=keep_s)
                count(process, "published")
                until = hold.own._renewed_s + keep_s
                ledger.promise(f"the manifest of {process.name}", manifest, until=until)
        except LeaseLost:
            count(process, "lease lost")
        except PublishTooSlow:
            count(process, "too slow")
        except FeaturesGone:
            count(process, "publish: features gone")
        except StoreUnreachable:
            count(process, "unreachable")
        finally:
            work.ended = True

    return run


def read_all(ledger: Ledger, reader: ManifestReader) -> list[Entry]:
    """Reads a manifest by name; returns what cannot be read, at its place or elsewhere."""
    bad: list[Entry] = []
    for row in reader.manifest.ready():
        try:
            (arrays,) = reader.read([(row.source, row.stream)])
        except CorruptEntry:
            bad.append(row.entry)
            continue
        if not is_true(row.entry.key, arrays):
            ledger.violate(f"{row.source} was read as {arrays['x'].tolist()}")
    return bad


def trainer(digest: str, *, hours: float) -> Program:
    """Holds a manifest and reads it several times."""

    def run(process: Process, ledger: Ledger) -> None:
        cache = cache_of(process, ledger)
        known = ledger.promised(digest)
        try:
            manifest = read_manifest(cache.store, digest)
        except FileNotFoundError:
            if known and known.stands(process.world.now):
                ledger.violate(f"{process.name}: no manifest {digest[:8]}, but {known.what}")
            return
        try:
            holders = holding.hold_manifest(cache, manifest, process.name)
        except FeaturesGone as error:
            count(process, "hold: features gone")
            if known and known.stands(process.world.now):
                if not known.contents & ledger.tainted:
                    count(process, "hold: PROMISED features gone")
                    ledger.refused(
                        f"{process.name} may not hold {digest[:8]}: {known.what}: {error}"
                    )
            return
        except LeaseLost:
            return
        if not holders:
            return
        promise = ledger.promise(process.name, manifest, process=process, holders=holders)
        try:
            reader = ManifestReader(cache, manifest)
            with leases.kept(holders):
                for _ in range(3):
                    bad = read_all(ledger, reader)
                    if not promise.stands(process.world.now):
                        count(process, "lease lost")
                        break
                    for entry in bad:
                        if (entry.key, entry.blake3) not in ledger.tainted:
                            ledger.violate(
                                f"{process.name} cannot read {entry.key[:8]} of {digest[:8]}"
                            )
                    count(process, "read")
                    process.world.wait(hours * HOUR_S / 3)
        except StoreUnreachable:
            count(process, "unreachable")
        finally:
            promise.ended = True
        for holder in holders:
            holder.release()

    return run


def pinner(digest: str, project: str, name: str) -> Program:
    """Pins a manifest."""

    def run(process: Process, ledger: Ledger) -> None:
        cache, started = cache_of(process, ledger), process.world.now
        pin = Pin(project=project, name=name, manifest=digest)
        try:
            holding.pin_manifest(cache, pin)
        except (FileNotFoundError, FeaturesGone, ValueError, StoreError) as error:
            count(process, f"pin: {type(error).__name__}")
            return
        count(process, "pinned")
        if ledger.unpinned.get(pin.path, -1.0) >= started:
            return
        if pin.path not in ledger.network.files:
            ledger.violate(f"{process.name} pinned {pin.path}, and there is no pin")
        manifest = ledger.manifests[digest]
        promise = ledger.promise(f"pin {project}/{name}", manifest)
        ledger.pins.setdefault(pin.path, []).append(promise)

    return run


def unpinner(project: str, name: str) -> Program:
    """Takes a pin away."""

    def run(process: Process, ledger: Ledger) -> None:
        store = SimStore(ledger.network, process)
        try:
            remove_pin(store, project, name)
        except (ValueError, StoreError):
            count(process, "unpin: none")

    return run


def verifier(*, quarantine: float, damage: float) -> Program:
    """Damages some of what it sees, checks all, and takes back what is bad, or thought to be."""

    def run(process: Process, ledger: Ledger) -> None:
        cache, rng = cache_of(process, ledger), process.world.rng
        index = load(process, ledger, cache)
        entries = list(index.entries())
        rng.shuffle(entries)
        for entry in entries[:1]:
            if entry.pack in ledger.network.files and rng.random() < damage:
                ledger.tainted.add((entry.key, entry.blake3))
                ledger.network.damage(entry.pack, entry.offset + rng.randrange(entry.length))
                process.world.note(process.name, f"damages {entry.pack}")
        bad = [entries[at] for at in read(ledger, cache, entries)]
        bad = [entry for entry in bad if entry.pack in ledger.network.files]
        if entries and rng.random() < quarantine:
            bad.append(entries[0])
            ledger.tainted.add((entries[0].key, entries[0].blake3))
        if bad:
            take_back(process, cache.store, bad)
            count(process, "taken back")

    return run


def snapshotter() -> Program:
    """Copies all commits into one file."""

    def run(process: Process, ledger: Ledger) -> None:
        cache = cache_of(process, ledger)
        if snapshots.snapshot_commits(cache, fewest=1):
            count(process, "snapshot")

    return run


def collector(*, grace_s: float = MIN_GRACE_S, sweep_after_s: float = 1200.0) -> Program:
    """One pass of garbage collection."""

    def run(process: Process, ledger: Ledger) -> None:
        store = SimStore(ledger.network, process)
        collect = Collector(
            store, grace_s=grace_s, sweep_after_s=sweep_after_s, clock=process.clock
        )
        try:
            report = collect.run(apply=True)
        except CollectionRuns:
            count(process, "gc: another runs")
            return
        count(process, "gc")
        process.stats["deleted"] = len(report.deleted)
        process.stats["spared"] = len(report.spared)

    return run


def compactor() -> Program:
    """Puts what is needed of small packs together."""

    def run(process: Process, ledger: Ledger) -> None:
        cache = cache_of(process, ledger)
        collect = Collector(
            cache.store, grace_s=MIN_GRACE_S, sweep_after_s=1200.0, clock=process.clock
        )
        done = compact(cache, collect, apply=True)
        count(process, "compacted" if done.packs else "nothing to compact")

    return run


__all__ = ["VARIANTS", "Promise", "contents_of"]
