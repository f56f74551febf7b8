"""One history: processes, faults and pauses drawn from a seed, then silence, then what must hold at the end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

from simulation import actors, fast_parquet, remembered
from simulation.ledger import Ledger
from simulation.network import Faults, Network
from simulation.samples import CLIPS, VARIANTS
from simulation.world import Process, Threads, World

from crab_platform import leases, manifest_reader
from crab_platform.cache import PublishTooSlow
from crab_platform.garbage import MIN_GRACE_S
from crab_platform.leases import LeaseLost
from crab_platform.storage import StoreUnreachable

HOUR_S = 3600.0
SKEW_S = 600.0
PROJECTS = ("red", "blue")


@contextmanager
def simulated(*, parquet: bool = False) -> Iterator[None]:
    """What histories need of the modules around the product; `parquet`: with real files."""
    with ExitStack() as stack:
        for module in (leases, manifest_reader):
            stack.enter_context(patch.object(module, "threading", Threads))
        if not parquet:
            stack.enter_context(fast_parquet.fast_parquet())
            stack.enter_context(remembered.remembered())
        yield


@dataclass(kw_only=True)
class Outcome:
    """What a history came to."""

    seed: int
    violations: list[str]
    errors: list[str]
    trace: list[str]
    stats: Counter[str] = field(default_factory=Counter)

    @property
    def failed(self) -> bool:
        return bool(self.violations or self.errors)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What kind of histories."""

    name: str
    faults: bool = True
    """Whether the network and the processes fail; clocks differ in any case."""
    crashes: bool = True


ALL = Profile(name="all")
CLOCKS = Profile(name="clocks", faults=False)
PROFILES = {one.name: one for one in (ALL, CLOCKS)}


def draw_faults(rng: random.Random, profile: Profile) -> Faults:
    """Each fault is off in many histories: that finds more than a little of everything."""
    faults = Faults(latency_s=rng.choice((0.2, 2.0, 9.0)), page=rng.choice((1, 2, 3, 1000)))
    if not profile.faults:
        return faults
    faults.lost = rng.choice((0, 0, 0.01, 0.05))
    faults.late = rng.choice((0, 0, 0.01, 0.03))
    faults.busy = rng.choice((0, 0, 0.05))
    faults.doubled = rng.choice((0, 0, 0.05))
    faults.crash = rng.choice((0, 0, 0.005, 0.02))
    faults.pause = rng.choice((0, 0, 0.005, 0.02))
    return faults


class History:
    """Builds and runs one history."""

    def __init__(self, seed: int, profile: Profile = ALL, *, trace: bool = False) -> None:
        fast_parquet.forget()
        remembered.forget()
        self.seed = seed
        self.world = World(seed, trace=trace)
        self.rng = self.world.rng
        self.profile = profile
        self.network = Network(self.world, draw_faults(self.rng, profile))
        self.ledger = Ledger(self.network)
        self.processes: list[Process] = []
        self.sweep_after_s = self.rng.choice((1200.0, 3 * HOUR_S))

    def process(self, kind: str) -> Process:
        skew_s = self.rng.choice((-SKEW_S, SKEW_S, 0.0, self.rng.uniform(-SKEW_S, SKEW_S)))
        made = Process(self.world, f"{kind}-{len(self.processes)}", skew_s)
        self.processes.append(made)
        return made

    def start(self, kind: str, program: actors.Program, in_s: float = 0.0) -> None:
        process = self.process(kind)

        def run() -> None:
            self.world.note(process.name, "starts")
            program(process, self.ledger)
            self.world.note(process.name, "ends")

        self.world.start(process, run, in_s)

    def run(self) -> Outcome:
        rng = self.rng
        at = 0.0
        for number in range(rng.randint(3, 6)):
            spread_s = rng.choice((1.0, 10.0, 60.0, 600.0))
            for _ in range(rng.randint(1, 4)):
                kind = "job" if number == 0 else rng.choice(KINDS)
                self.world.at(at + rng.random() * spread_s, self._starter(kind))
            at += rng.choice((60.0, 1200.0, HOUR_S, 3 * HOUR_S, 6 * HOUR_S)) * (0.5 + rng.random())
        self.world.run()
        self._quiet()
        return self._outcome()

    def _starter(self, kind: str) -> Callable[[], None]:
        # Drawn when it starts: what there is to train on or to pin is known only then.
        return lambda: self.start(kind, self._program(kind))

    def _program(self, kind: str) -> actors.Program:
        rng = self.rng
        digests = sorted(self.ledger.manifests)
        if kind in ("trainer", "pinner") and not digests:
            kind = "job"
        if kind == "job":
            clips = rng.sample(range(CLIPS), rng.choice((1, 1, 2, 3)))
            return actors.job(
                clips,
                variant=0 if rng.random() < 0.8 else rng.randrange(VARIANTS),
                stay_s=rng.choice((0, 0, 0, 0, 60.0, 1200.0, HOUR_S, 5 * HOUR_S)),
                keep_s=rng.choice((1800.0, 6 * HOUR_S, 48 * HOUR_S)),
            )
        if kind == "trainer":
            return actors.trainer(rng.choice(digests), hours=rng.choice((0.1, 0.1, 0.5, 2.5)))
        if kind == "pinner":
            return actors.pinner(rng.choice(digests), rng.choice(PROJECTS), rng.choice("ab"))
        if kind == "unpinner":
            return actors.unpinner(rng.choice(PROJECTS), rng.choice("ab"))
        if kind == "verifier":
            return actors.verifier(quarantine=0.2, damage=0.3)
        if kind == "snapshotter":
            return actors.snapshotter()
        if kind == "compactor":
            return actors.compactor()
        return actors.collector(sweep_after_s=self.sweep_after_s)

    def _quiet(self) -> None:
        """No more faults: readers agree, and what nobody needs goes in two passes."""
        world, ledger = self.world, self.ledger
        self.network.faults.stop()
        ledger.ending = True
        world.note("", "---- all processes have ended")
        world.now += HOUR_S
        expected = ledger.winners()
        for _ in range(2):
            self.start("reader", lambda process, ledger: self._agree(process, expected))
        world.run()
        # All leases end; pins stay.
        longest_s = max([60.0, *(p.until - world.now for p in ledger.promises if p.until < 1e12)])
        world.now += max(longest_s, 50 * HOUR_S) + 3 * SKEW_S
        for _ in range(2):
            world.now += MIN_GRACE_S + self.sweep_after_s + 6 * SKEW_S
            self.start("gc", actors.collector(sweep_after_s=self.sweep_after_s))
            world.run()
        if garbage := ledger.garbage():
            ledger.violate(f"garbage stays: {garbage}")

    def _agree(self, process: Process, expected: dict[str, str]) -> None:
        cache = actors.cache_of(process, self.ledger)
        index = cache.index()
        found = {key: entry.commit for key, entry in index.lookup(list(index)).items()}
        if found != expected:
            self.ledger.violate(f"{process.name} sees {found}, expected {expected}")
        entries = list(index.entries())
        for at, error in actors.read(self.ledger, cache, entries).items():
            if (entries[at].key, entries[at].blake3) not in self.ledger.tainted:
                self.ledger.violate(f"an entry of the index cannot be read: {error}")

    def _outcome(self) -> Outcome:
        errors = [
            f"{p.name}: {type(p.error).__name__}: {p.error}"
            for p in self.processes
            if p.error is not None and not isinstance(p.error, EXPECTED)
        ]
        stats: Counter[str] = Counter()
        for process in self.processes:
            stats.update(process.stats)
            stats[process.name.rpartition("-")[0]] += 1
            stats["died"] += process.dead
            if isinstance(process.error, EXPECTED):
                stats[f"ended by {type(process.error).__name__}"] += 1
        return Outcome(
            seed=self.seed,
            violations=self.ledger.violations,
            errors=errors,
            trace=self.world.trace,
            stats=stats,
        )


KINDS = (
    *("job",) * 5,
    *("gc",) * 5,
    *("trainer",) * 3,
    *("pinner",) * 2,
    "unpinner",
    "verifier",
    "snapshotter",
    "compactor",
)
EXPECTED = (StoreUnreachable, LeaseLost, PublishTooSlow)
"""How a process may end when the network is bad."""
