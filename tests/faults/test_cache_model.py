"""The cache against a model of it (A13 of reference/reliability.md): any sequence of steps, one after the other.

The model is a dict. What the cache answers must be what the model says; only what nobody needs any more may be gone,
and only after its grace.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation.fast_parquet import fast_parquet
from simulation.network import Faults, Network, SimStore
from simulation.planted import planted
from simulation.remembered import forget, remembered
from simulation.samples import CLIPS, ENTRIES, KEYS, VARIANTS
from simulation.world import Process, World

from crab_platform import holding, leases
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestRow
from crab_platform.compaction import compact
from crab_platform.garbage import MIN_GRACE_S, Collector
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import CorruptEntry, Entry
from crab_platform.pins import Pin, pin_path, read_pins, remove_pin
from crab_platform.quarantine import CORRUPT, BadEntry, write_quarantine
from crab_platform.snapshots import snapshot_commits

HOUR_S = 3600.0
clips = st.integers(0, CLIPS - 1)
names = st.sampled_from(["a", "b"])
Content = tuple[str, str]


class CacheMachine(RuleBasedStateMachine):
    """Steps on a cache and on the model."""

    @initialize()
    def start(self) -> None:
        world = World(1)
        self.process = Process(world, "model", 0.0)
        self.world, self.network = world, Network(world, Faults(latency_s=0.01))
        self.store = SimStore(self.network, self.process)
        self.reload()
        self.rows: dict[str, dict[str, tuple[Content, str, float]]] = {}
        """Key -> commit id -> content, pack, when."""
        self.variant: dict[Content, int] = {}
        self.damaged: set[str] = set()
        """Packs."""
        self.pins: dict[str, Manifest] = {}
        self.kept: list[tuple[float, Manifest]] = []
        self.lost: set[Content] = set()
        """Damaged or taken back: nobody is promised these."""

    def expected(self) -> dict[str, str]:
        return {key: min(copies) for key, copies in self.rows.items() if copies}

    def needed(self, manifest: Manifest) -> set[Content]:
        return {(row.entry.key, row.entry.blake3) for row in manifest.ready() if row.entry}

    def promised(self) -> list[Manifest]:
        now = self.world.now
        return [*self.pins.values(), *(one for until, one in self.kept if until > now)]

    @rule(numbers=st.lists(clips, min_size=1, max_size=3, unique=True), variant=st.integers(0, 1))
    def commit(self, numbers: list[int], variant: int) -> None:
        self.world.now += 1.0
        for entry in self.cache.commit([ENTRIES[n][variant % VARIANTS] for n in numbers]):
            content = (entry.key, entry.blake3)
            self.variant[content] = variant
            copies = self.rows.setdefault(entry.key, {})
            copies[entry.commit] = (content, entry.pack, self.world.now)

    @rule()
    def reload(self) -> None:
        self.cache = FeatureCache(self.store, clock=self.process.clock)

    @rule()
    def look_up_and_read(self) -> None:
        found = self.cache.index().lookup(KEYS)
        assert {key: entry.commit for key, entry in found.items()} == self.expected()
        for key, entry in found.items():
            content, pack, _ = self.rows[key][entry.commit]
            assert (key, entry.blake3) == content
            self.reads(entry, content, pack)

    def reads(self, entry: Entry, content: Content, pack: str) -> None:
        try:
            (arrays,) = self.cache.read([entry])
        except CorruptEntry:
            assert pack in self.damaged
            return
        assert arrays["x"].tolist() == [KEYS.index(entry.key), self.variant[content], 1.5]

    @rule()
    def copies_are_all_there(self) -> None:
        index = self.cache.index()
        for key in KEYS:
            found = [copy.commit for copy in index.copies(key)]
            assert found == sorted(self.rows.get(key, {}))

    @precondition(lambda self: any(self.rows.values()))
    @rule(choice=st.randoms(use_true_random=False))
    def damage(self, choice: random.Random) -> None:
        if choice.random() < 0.8:
            return  # else nothing sound is left
        key, identifier = self.one(choice)
        _, pack, _ = self.rows[key][identifier]
        index = self.cache.index()
        (entry,) = [copy for copy in index.copies(key) if copy.commit == identifier]
        self.network.damage(pack, entry.offset + choice.randrange(entry.length))
        self.damaged.add(pack)
        for copies in self.rows.values():
            self.lost |= {content for content, where, _ in copies.values() if where == pack}

    @precondition(lambda self: any(self.rows.values()))
    @rule(choice=st.randoms(use_true_random=False))
    def quarantine(self, choice: random.Random) -> None:
        if choice.random() < 0.8:
            return
        key, identifier = self.one(choice)
        bad = BadEntry(key=key, commit=identifier, reason=CORRUPT)
        write_quarantine(self.store, [bad], clock=self.process.clock)
        content, _, _ = self.rows[key].pop(identifier)
        self.lost.add(content)

    def one(self, choice: random.Random) -> tuple[str, str]:
        return choice.choice([(key, c) for key, copies in self.rows.items() for c in copies])

    @rule(
        numbers=st.lists(clips, min_size=1, max_size=3, unique=True), hours=st.sampled_from([1, 50])
    )
    def publish(self, numbers: list[int], hours: int) -> None:
        """A whole preprocess job."""
        hold = holding.hold_job(self.cache, "job")
        found = self.cache.index(hold.exclude).lookup([KEYS[n] for n in numbers])
        rows = [
            ManifestRow(
                source=f"clip{KEYS.index(key)}", stream="video", status="ready", entry=entry
            )
            for key, entry in found.items()
        ]
        if not rows:
            hold.release()
            return
        manifest = holding.publish_manifest(hold, rows, keep_s=hours * HOUR_S)
        self.kept.append((self.world.now + hours * HOUR_S, manifest))

    @precondition(lambda self: self.promised())
    @rule(choice=st.randoms(use_true_random=False), name=names)
    def pin(self, choice: random.Random, name: str) -> None:
        manifest = choice.choice(self.promised())
        try:
            holding.pin_manifest(self.cache, Pin(project="p", name=name, manifest=manifest.digest))
        except ValueError:
            assert name in self.pins
            assert self.pins[name].digest != manifest.digest
        except holding.FeaturesGone:
            assert self.needed(manifest) & self.lost
            self.pins[name] = manifest  # it stands, for what is left
        else:
            assert name not in self.pins or self.pins[name].digest == manifest.digest
            self.pins[name] = manifest

    @rule(name=names)
    def unpin(self, name: str) -> None:
        if name in self.pins:
            remove_pin(self.store, "p", name)
            del self.pins[name]
        else:
            with pytest.raises(ValueError, match="there is no pin"):
                remove_pin(self.store, "p", name)

    @rule()
    def what_is_promised_can_be_read(self) -> None:
        for manifest in self.promised():
            for row in manifest.ready():
                assert row.entry is not None
                content = (row.entry.key, row.entry.blake3)
                if content in self.lost:
                    continue
                (arrays,) = ManifestReader(self.cache, manifest).read([(row.source, row.stream)])
                assert arrays["x"].tolist()[1] == self.variant[content]

    @rule()
    def snapshot(self) -> None:
        snapshot_commits(self.cache, fewest=1)

    def collector(self) -> Collector:
        return Collector(
            self.store, grace_s=MIN_GRACE_S, sweep_after_s=1200.0, clock=self.process.clock
        )

    @rule()
    def compact(self) -> None:
        before = set(self.network.files)
        compact(self.cache, self.collector(), apply=True)
        if set(self.network.files) == before:
            return
        # Copies are entries like any other; where they lie is the cache's own affair.
        for entry in self.cache.index().entries():
            copies = self.rows.setdefault(entry.key, {})
            if entry.commit not in copies:
                content = (entry.key, entry.blake3)
                assert content in {one for one, _, _ in copies.values()}
                copies[entry.commit] = (content, entry.pack, self.world.now)

    @rule(hours=st.sampled_from([0.5, 1.0, 3.0, 60.0]))
    def collect(self, hours: float) -> None:
        self.world.now += hours * HOUR_S
        self.collector().run(apply=True)
        there = {path.partition("/")[2].partition(".")[0] for path in self.store.list("commits")}
        for copies in self.rows.values():
            for identifier in sorted(copies.keys() - there):
                content, _, made = copies.pop(identifier)
                assert self.world.now - made > MIN_GRACE_S
                if content not in self.lost and any(
                    content in self.needed(one) for one in self.promised()
                ):
                    assert content in {one for one, _, _ in copies.values()}

    @invariant()
    def what_is_pinned_is_listed(self) -> None:
        if hasattr(self, "pins"):
            found = {pin.path for pin in read_pins(self.store)}
            assert found == {pin_path("p", name) for name in self.pins}

    def teardown(self) -> None:
        """All garbage goes in two passes."""
        forget()
        self.kept = []
        self.world.now += 60 * HOUR_S
        for _ in range(2):
            self.collect(60.0)
        packs = {pack for copies in self.rows.values() for _, pack, _ in copies.values()}
        assert set(self.store.list("packs")) >= packs
        assert self.store.list("condemned") == self.store.list("leases") == []
        wanted = {content for one in self.pins.values() for content in self.needed(one)}
        commits = {c for copies in self.rows.values() for c in copies}
        assert len(commits) <= len(wanted)


class _Never:
    """threading.Thread for a lease that need not be renewed while a step lasts."""

    def __init__(self, **_: object) -> None:
        return

    def start(self) -> None:
        return

    def join(self) -> None:
        return


@contextmanager
def no_threads() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(fast_parquet())
        stack.enter_context(remembered())
        threads = SimpleNamespace(Lock=threading.Lock, Event=threading.Event, Thread=_Never)
        stack.enter_context(patch.object(leases, "threading", threads))
        yield


def run_model(examples: int, steps: int) -> None:
    with no_threads():
        run_state_machine_as_test(
            CacheMachine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                derandomize=True,
                database=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )


def test_the_cache_does_what_the_model_does() -> None:
    run_model(200, 75)


@pytest.mark.faults
def test_the_cache_does_what_the_model_does_for_long() -> None:
    run_model(1000, 500)


@pytest.mark.parametrize("bug", ["quarantine_not_read", "sweep_ignores_pins", "digest_not_checked"])
def test_the_model_finds_a_planted_bug(bug: str) -> None:
    with planted(bug), pytest.raises((AssertionError, CorruptEntry)):
        run_model(100, 75)
