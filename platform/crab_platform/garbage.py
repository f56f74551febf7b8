"""Garbage collection: mark what nobody needs, wait, look again, delete.

What is needed: the features of every manifest in a live lease or a pin, of whatever project; and
everything younger than the grace, since whoever made it may be about to say so. Deletion takes two
passes, days apart. The first condemns (`condemned.py`). The second, once a set is old enough,

    1. marks the set as being swept: jobs that start from here on leave it out;
    2. waits for live jobs whose index may still hold it (their leases have not `seen` it);
    3. reads all leases and pins again, takes out of the set what they need, and writes the decision, once;
    4. deletes commits, then packs, then all else, and the set itself last.

Nothing depends on clocks but the death of a lease and the two graces, which allow for clocks ten
minutes off. One collection runs at a time, by a lease of its own: one that slept through a decision
of another would carry out its own, made of leases and pins as they were. A sweep that was killed is
taken up at its step, once its lease is dead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from crab_platform import commits, condemned, leases
from crab_platform.catalog import MANIFESTS, manifest_path, read_manifest
from crab_platform.clock import SYSTEM, Clock
from crab_platform.commit_table import CommitTable, Content, content_of
from crab_platform.commits import COMMITS, PACKS
from crab_platform.condemned import CondemnedSet, Doomed
from crab_platform.leases import SKEW_S, Lease, LeaseHolder, read_leases
from crab_platform.pins import Pin, read_pins
from crab_platform.storage import AlreadyExists, Store
from crab_platform.trust import EVERYONE, Trust, parse_path

DAY_S = 86400.0
MIN_GRACE_S = 2 * 3600 + SKEW_S
"""Longer than a pack may wait for its commit (cache.PUBLISH_LIMIT_S) with two clocks ten minutes off."""

DUPLICATE = "an earlier commit has the same features"
NOT_NEEDED = "in no manifest of a lease or pin"
TAKEN_BACK = "in quarantine"
NO_COMMIT = "a pack without a commit: its writer died"
NOT_HELD = "a manifest of no lease or pin"

MANIFEST_MISSING = "a manifest of a lease or pin is not there: what it needs is not known"

_DELETE_AT_ONCE = 256

COLLECTION = "(garbage collection)"
"""The job of a collection's lease."""


class CollectionRuns(Exception):  # noqa: N818 (the condition)
    """Another garbage collection of the same store is at work."""


@dataclass(frozen=True, kw_only=True)
class Roots:
    """Why things are kept."""

    leases: tuple[Lease, ...]
    """Live ones."""
    dead_leases: tuple[str, ...]
    """Paths of leases that nobody can hold any more."""
    pins: tuple[Pin, ...]

    @property
    def manifests(self) -> set[str]:
        """Digests of all manifests that somebody needs."""
        return {m for lease in self.leases for m in lease.manifests} | {
            pin.manifest for pin in self.pins
        }


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A set that was not swept in this pass, and why."""

    identifier: str
    why: str
    paths: int


@dataclass(kw_only=True)
class Report:
    """What a pass did, or would have done."""

    applied: bool
    condemned: Doomed = field(default_factory=dict)
    """Path -> why: condemned by this pass."""
    deleted: Doomed = field(default_factory=dict)
    spared: Doomed = field(default_factory=dict)
    """Condemned before, and needed again."""
    waiting: list[Waiting] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    """Commit -> reason: of a zone that is not trusted, of a newer version, unreadable. While there are any, packs
    are not judged either: one of these may be all that names them."""
    missing_manifests: list[str] = field(default_factory=list)
    """Leased or pinned, but not there: what they hold cannot be known, so nothing is condemned or deleted."""


OnProgress = Callable[[int, int], None]


class Collector:
    """One pass over one store."""

    def __init__(
        self,
        store: Store,
        *,
        trust: Trust = EVERYONE,
        grace_s: float = 7 * DAY_S,
        sweep_after_s: float = 3 * DAY_S,
        clock: Clock = SYSTEM,
    ) -> None:
        """Nothing younger than `grace_s` is condemned; nothing is deleted before it was condemned for
        `sweep_after_s`.

        Raises ValueError for a grace under MIN_GRACE_S.
        """
        if grace_s < MIN_GRACE_S:
            raise ValueError(
                f"a grace of {grace_s / DAY_S:g} days is too short: a writer may take an hour between a pack and its "
                f"commit, and clocks differ; expected at least {MIN_GRACE_S / DAY_S:.2g} days"
            )
        self.store = store
        self.trust = trust
        self.grace_s = grace_s
        self.sweep_after_s = max(sweep_after_s, SKEW_S)
        self.clock = clock
        self._check: Callable[[], None] = lambda: None
        """Raises LeaseLost when another collection may run by now. Called before everything that changes the store."""

    def run(self, *, apply: bool, on_progress: OnProgress | None = None) -> Report:
        """One pass: sweeps what is old enough, then condemns. Without `apply` nothing at all is written.

        Raises CollectionRuns when there is another, and LeaseLost when this one was cut off for so long that
        there may be; what it has begun is taken up by the next.
        """
        report = Report(applied=apply)
        if apply and not self.trust.zones:
            zones = {name.zone for p in self.store.list(COMMITS) if (name := parse_path(p))} - {""}
            if zones:
                raise ValueError(
                    f"{self.store.url} has commits signed by {', '.join(sorted(zones))}: give the spec that trusts "
                    "them instead of the URL, or anybody's files would count as theirs"
                )
        if not apply:
            self._pass(report, apply=False, on_progress=on_progress)
            return report
        own = LeaseHolder(self.store, COLLECTION, clock=self.clock)
        own.renew()
        try:
            for _, lease in read_leases(self.store):
                if (
                    lease.job == COLLECTION
                    and lease.holder != own.lease.holder
                    and not lease.is_dead(self.clock.time_ns())
                ):
                    raise CollectionRuns(
                        f"another garbage collection of {self.store.url} runs, or was killed less than an hour ago; "
                        "start again when it has ended"
                    )
            self._check = own.check
            with leases.kept([own]):
                self._pass(report, apply=True, on_progress=on_progress)
        finally:
            own.release()
        return report

    def _pass(self, report: Report, *, apply: bool, on_progress: OnProgress | None) -> None:
        sets = condemned.list_sets(self.store)
        for found in sets:
            self.sweep(found, report, apply=apply, on_progress=on_progress)
        doomed = self.mark(report)
        if doomed:
            report.condemned = doomed
            if apply:
                self._check()
                path = condemned.set_path(self.clock.new_id())
                condemned.write_doomed(self.store, path, doomed)
        if apply:
            self._tidy()

    def roots(self) -> Roots:
        """All leases and pins as they are now."""
        live: list[Lease] = []
        dead: list[str] = []
        for paths, lease in read_leases(self.store):
            if lease.is_dead(self.clock.time_ns()):
                dead += paths
            else:
                live.append(lease)
        return Roots(leases=tuple(live), dead_leases=tuple(dead), pins=tuple(read_pins(self.store)))

    def mark(self, report: Report) -> Doomed:
        """What is garbage now and in no set yet: path -> why."""
        known = condemned.paths_of(self.store, condemned.list_sets(self.store))
        # Packs are listed before commits: a pack whose commit comes in between is not taken for an orphan.
        packs = self.store.list(PACKS)
        roots = self.roots()
        doomed: Doomed = {}
        table = CommitTable.load(self.store, self.trust)
        needed = self.needed(roots, table, report)
        report.left_alone = table.left_alone
        if report.missing_manifests:
            return {}
        kept = table.kept(needed, exclude=known)
        for path, identifier in table.ids.items():
            if path in known or path in kept or path in table.left_alone:
                continue
            if not self.is_old(identifier):
                continue
            contents = table.commits.get(path)
            if not contents:
                # Only where the quarantine says why: absence alone proves nothing.
                if identifier in table.taken_back:
                    doomed[path] = TAKEN_BACK
            else:
                doomed[path] = DUPLICATE if needed.issuperset(contents) else NOT_NEEDED
        # A commit that cannot be read may be the only one that names a pack.
        if not table.left_alone:
            named = {pack for members in table.packs.values() for pack in members}
            for path in packs:
                pack = commits.pack_id(path)
                if path not in named and path not in known and pack and self.is_old(pack):
                    doomed[path] = NO_COMMIT
        held = {manifest_path(digest) for digest in roots.manifests}
        for path in self.store.list(MANIFESTS):
            if path not in held and path not in known:
                doomed[path] = NOT_HELD
        return doomed

    def sweep(
        self,
        found: CondemnedSet,
        report: Report,
        *,
        apply: bool,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Deletes one set, as far as it may be."""
        if not found.is_listed:
            # A sweep was killed at its very end.
            if apply:
                self._check()
                condemned.remove_set(self.store, found)
            return
        try:
            doomed = condemned.read_doomed(self.store, condemned.set_path(found.identifier))
        except FileNotFoundError:
            return  # a collection that was given up for dead ended its sweep after all

        def wait(why: str) -> None:
            report.waiting.append(Waiting(identifier=found.identifier, why=why, paths=len(doomed)))

        age_s = (self.clock.time_ns() - commits.id_time_ns(found.identifier)) / 1e9
        if age_s < self.sweep_after_s + SKEW_S and not found.is_sweeping:
            hours = (self.sweep_after_s + SKEW_S - age_s) / 3600
            wait(f"condemned {age_s / 3600:.1f} h ago; may be deleted in {hours:.1f} h")
            return
        if apply and not found.is_sweeping:
            found, doomed = self._narrowed(found, doomed, report)
            if report.missing_manifests:
                wait(MANIFEST_MISSING)
                return
            self._create(condemned.sweeping_path(found.identifier), b"")
        roots = self.roots()
        blocking = [
            lease.job
            for lease in roots.leases
            if lease.seen is not None and found.identifier not in lease.seen
        ]
        if blocking and not found.is_decided:
            wait(f"jobs that may still use it: {', '.join(sorted(set(blocking)))}")
            return
        delete = self.decide(found, doomed, roots, report)
        if report.missing_manifests:
            wait(MANIFEST_MISSING)
            return
        if apply:
            self._check()
            try:
                condemned.write_doomed(
                    self.store, condemned.decision_path(found.identifier), delete
                )
            except AlreadyExists:
                delete = self._still_garbage(found, doomed, delete)
            self._delete(delete, on_progress)
            self._check()
            condemned.remove_set(self.store, found)
        report.deleted |= delete
        report.spared |= {path: why for path, why in doomed.items() if path not in delete}

    def _narrowed(
        self, found: CondemnedSet, doomed: Doomed, report: Report
    ) -> tuple[CondemnedSet, Doomed]:
        """The set without what is needed again: while a set is marked, nobody else can come to need what is in it."""
        delete = self.decide(found, doomed, self.roots(), report)
        rest = {path: why for path, why in doomed.items() if path in delete}
        if rest == doomed or report.missing_manifests:
            return found, doomed
        # As old as the set that it replaces, so that nothing in it has to wait again.
        identifier = found.identifier[:16] + self.clock.new_id()[16:]
        self._check()
        condemned.write_doomed(self.store, condemned.set_path(identifier), rest)
        self.store.delete(condemned.set_path(found.identifier))
        report.spared |= {path: why for path, why in doomed.items() if path not in rest}
        return replace(found, identifier=identifier), rest

    def _still_garbage(self, found: CondemnedSet, doomed: Doomed, now: Doomed) -> Doomed:
        """What an earlier pass decided, as far as it is garbage now, and could be in such a decision at all.

        Somebody who may only create files must not delete by the hand of whoever runs this.
        """
        path = condemned.decision_path(found.identifier)
        decided = condemned.read_doomed(self.store, path)
        table = CommitTable.load(self.store, self.trust)
        alive = {pack for members in table.packs.values() for pack in members}
        # Packs of commits that this very sweep has deleted before it was killed.
        orphans = {
            pack: why
            for pack, why in decided.items()
            if (identifier := commits.pack_id(pack))
            and pack not in alive
            and not table.left_alone
            and self.is_old(identifier)
        }
        return orphans | {path: why for path, why in decided.items() if path in now}

    def decide(self, found: CondemnedSet, doomed: Doomed, roots: Roots, report: Report) -> Doomed:
        """What of a set is deleted, now that all leases and pins are known."""
        table = CommitTable.load(self.store, self.trust)
        needed = self.needed(roots, table, report)
        sets = condemned.list_sets(self.store)
        kept = table.kept(needed, exclude=condemned.paths_of(self.store, sets))
        # What is needed and has no copy of the same zone outside the condemned sets stays where it is.
        elsewhere: dict[str, set[Content]] = {}
        for path in kept:
            elsewhere.setdefault(table.zones[path], set()).update(table.commits[path])
        delete: Doomed = {}
        for path, why in doomed.items():
            if not path.startswith(f"{COMMITS}/"):
                continue
            there = elsewhere.get(table.zones.get(path, ""), set())
            if path not in table.left_alone and not any(
                content in needed and content not in there
                for content in table.commits.get(path, ())
            ):
                delete[path] = why
        alive = {
            pack for path, members in table.packs.items() if path not in delete for pack in members
        }
        if not table.left_alone:
            gone = {pack: why for p, why in delete.items() for pack in table.packs.get(p, ())}
            delete |= {pack: why for pack, why in gone.items() if pack not in alive}
            orphans = {path for path in doomed if path.startswith(f"{PACKS}/")}
            delete |= {path: doomed[path] for path in orphans - alive}
        held = {manifest_path(digest) for digest in roots.manifests}
        manifests = {path for path in doomed if path.startswith(f"{MANIFESTS}/")}
        return delete | {path: doomed[path] for path in manifests - held}

    def needed(self, roots: Roots, table: CommitTable, report: Report) -> set[Content]:
        """The contents of every manifest that somebody needs, and the decoded windows of the same clips."""
        needed: set[Content] = set()
        media: set[str] = set()
        for digest in sorted(roots.manifests):
            try:
                manifest = read_manifest(self.store, digest)
            except FileNotFoundError:
                if digest not in report.missing_manifests:
                    report.missing_manifests.append(digest)
                continue
            needed |= {
                content_of(row.entry.key, row.entry.blake3)
                for row in manifest.rows
                if row.entry is not None
            }
            media |= {row.media_sha256 for row in manifest.rows}
        return needed | {content for content, of in table.windows.items() if of in media}

    def is_old(self, identifier: str) -> bool:
        """Whether what has this id is older than the grace, whatever the clocks say."""
        age_s = (self.clock.time_ns() - commits.id_time_ns(identifier)) / 1e9
        return age_s > self.grace_s + SKEW_S

    def _create(self, path: str, data: bytes) -> None:
        self._check()
        try:
            self.store.create(path, data)
        except AlreadyExists:
            return

    def _delete(self, doomed: Doomed, on_progress: OnProgress | None) -> None:
        """Commits first: an entry whose features are gone must not exist for a moment."""
        first = [path for path in doomed if path.startswith(f"{COMMITS}/")]
        # The only names that come back: whoever publishes the same data writes the same manifest. So each is
        # deleted only while nobody else can have ended this sweep.
        last = [path for path in doomed if path.startswith(f"{MANIFESTS}/")]
        others = [path for path in doomed if not path.startswith((f"{COMMITS}/", f"{MANIFESTS}/"))]
        done = 0
        for paths, at_once in ((first, _DELETE_AT_ONCE), (others, _DELETE_AT_ONCE), (last, 1)):
            paths.sort()
            for start in range(0, len(paths), at_once):
                self._check()
                self.store.delete_all(paths[start : start + at_once])
                done += len(paths[start : start + at_once])
                if on_progress:
                    on_progress(done, len(doomed))

    def _tidy(self) -> None:
        """Dead leases. Quarantines stay for good: they are small, and the commit that one takes back could return.

        (Whoever may write to the store can put an old signed commit and its pack where they were.)
        """
        self.store.delete_all(self.roots().dead_leases)
