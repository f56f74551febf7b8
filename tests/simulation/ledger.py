"""What must hold, checked at every change of the store and at every look into the cache.

The ledger sees everything: what lies in the store, who was promised what, and who is alive. Processes tell it what they
were promised; it finds out itself whether a deletion breaks a promise.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from simulation.network import Network
from simulation.samples import KEYS, number_of
from simulation.world import Process

from crab_platform import commits
from crab_platform.catalog import Manifest
from crab_platform.packs import Entry
from crab_platform.trust import parse_path

Content = tuple[str, str]
"""(key, blake3)."""

FENCE_S = 1350.0
"""For so long after it was last renewed a lease is good."""

YOUNG_S = 2 * 3600.0 + 1200.0
"""Nothing that is younger may be deleted, whatever the clocks say: the smallest grace."""


@dataclass(kw_only=True)
class Promise:
    """Somebody may rely on these contents, and on this manifest, until then."""

    what: str
    digest: str
    contents: frozenset[Content]
    until: float = float("inf")
    process: Process | None = None
    holders: Sequence[Any] = ()
    ended: bool = False

    def stands(self, now: float) -> bool:
        if self.ended or now > self.until:
            return False
        return self.process is None or lives(self.process, self.holders)


@dataclass(kw_only=True)
class Work:
    """A live job and the commits that it found or made."""

    process: Process
    holder: Any
    commits: set[str] = field(default_factory=set)
    ended: bool = False

    def stands(self) -> bool:
        return not self.ended and lives(self.process, (self.holder,))


def lives(process: Process, holders: Iterable[Any]) -> bool:
    """Whether a process is entitled to what it holds."""
    now = process.clock.monotonic()
    return not process.dead and all(now - holder._renewed_s <= FENCE_S for holder in holders)


class Ledger:
    """Promises, facts, and the violations found."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.world = network.world
        self.violations: list[str] = []
        self.rows: dict[str, list[tuple[str, str, str]]] = {}
        """Commit id -> (key, blake3, pack) of each row."""
        self.paths: dict[str, str] = {}
        """Commit id -> path, of commits that are there."""
        self.landed: dict[str, float] = {}
        self.promises: list[Promise] = []
        self.works: list[Work] = []
        self.tainted: set[Content] = set()
        """Damaged or taken back: nobody is promised these any more."""
        self.taken_back: set[tuple[str, str]] = set()
        """(key, commit id) in quarantine."""
        self.bytes: dict[str, bytes] = {}
        self.manifests: dict[str, Manifest] = {}
        self.ending = False
        self.pins: dict[str, list[Promise]] = {}
        self.unpinned: dict[str, float] = {}
        self.refusals: list[str] = []
        network.on_create = self.created
        network.on_delete = self.deleted

    def violate(self, what: str) -> None:
        """Something that must not be was seen."""
        self.world.note("LEDGER", f"VIOLATION: {what}")
        self.violations.append(what)

    def refused(self, what: str) -> None:
        """Somebody was told that features are gone which others were promised."""
        self.world.note("LEDGER", f"REFUSED: {what}")
        self.refusals.append(what)

    def created(self, path: str, data: bytes, who: str) -> None:
        folder = path.partition("/")[0]
        if folder in ("packs", "commits", "leases", "quarantine", "snapshots"):
            if self.bytes.setdefault(path, data) != data:
                self.violate(f"{path} had other bytes before")
        self.landed[path] = self.world.now
        if folder == "quarantine":
            for row in pq.ParquetFile(io.BytesIO(data)).read(["key", "commit"]).to_pylist():
                self._take_back(row["key"], row["commit"], who)
        if folder == "commits":
            name = parse_path(path)
            assert name is not None
            # All the columns that an index reads: then it is read once for both (`remembered`).
            columns = commits.read_commit(data).select(["key", "blake3", "pack"]).to_pydict()
            rows = list(zip(columns["key"], columns["blake3"], columns["pack"], strict=True))
            self.rows[name.identifier] = rows
            self.paths[name.identifier] = path
            for _, _, pack in rows:
                if pack not in self.network.files:
                    self.violate(f"commit {path} exists without its pack")

    def _take_back(self, key: str, identifier: str, who: str) -> None:
        self.taken_back.add((key, identifier))
        for k, blake3, _ in self.rows.get(identifier, ()):
            if k == key and (key, blake3) not in self.tainted:
                self.violate(
                    f"{who} put clip {number_of(key)} of {identifier} into quarantine: it is sound"
                )
                self.tainted.add((key, blake3))

    def deleted(self, path: str, who: str) -> None:
        folder, _, rest = path.partition("/")
        now = self.world.now
        if folder == "pins":
            promises = self.pins.pop(path, [])
            if who.startswith("unpinner"):
                self.unpinned[path] = now
            elif promises:
                # Known: two who pin the same under one name at once, and the first finds that it cannot be kept.
                self.refused(f"{who} deleted {path}, which somebody else was promised")
            for promise in promises:
                promise.ended = True
            return
        if folder == "manifests":
            digest = rest.partition(".")[0]
            for promise in self._standing():
                if promise.digest == digest:
                    self.violate(f"{who} deleted manifest {digest[:8]}, which {promise.what} needs")
            return
        if folder not in ("commits", "packs"):
            return
        if now - self.landed[path] < YOUNG_S and not (folder == "packs" and self._taken(path)):
            self.violate(f"{who} deleted {path} when it was {now - self.landed[path]:.0f} s old")
        if folder == "commits":
            name = parse_path(path)
            assert name is not None
            gone = [name.identifier]
            del self.paths[name.identifier]
        else:
            gone = [c for c in self.paths if any(pack == path for _, _, pack in self.rows[c])]
            for identifier in gone:
                if any((k, identifier) not in self.taken_back for k, _, _ in self.rows[identifier]):
                    self.violate(f"{who} deleted {path}, and its commit {identifier} exists")
        lost: set[Content] = set()
        for identifier in gone:
            rows = [
                (k, b)
                for k, b, _ in self.rows[identifier]
                if (k, identifier) not in self.taken_back
            ]
            lost |= {(k, b) for k, b in rows if (k, b) not in self.tainted}
            if not lost:
                continue
            for work in self.works:
                if identifier in work.commits and work.stands():
                    self.violate(f"{who} deleted {path}, which live {work.process.name} uses")
        lost = {content for content in lost if not self.readable(content)}
        if lost:
            for promise in self._standing():
                if missing := promise.contents & lost:
                    keys = sorted(number_of(key) for key, _ in missing)
                    self.violate(f"{who} deleted {path}: {promise.what} needs clips {keys}")

    def _taken(self, pack: str) -> bool:
        return any(
            pack == p and (k, c) in self.taken_back
            for c, rows in self.rows.items()
            for k, _, p in rows
        )

    def _standing(self) -> Iterator[Promise]:
        return (promise for promise in self.promises if promise.stands(self.world.now))

    def readable(self, content: Content) -> bool:
        """Whether some commit leads to it."""
        return any(
            (key, blake3) == content
            and pack in self.network.files
            and (key, identifier) not in self.taken_back
            for identifier in self.paths
            for key, blake3, pack in self.rows[identifier]
        )

    def promised(self, digest: str) -> Promise | None:
        """A promise that stands for a manifest."""
        return next((one for one in self._standing() if one.digest == digest), None)

    def promise(self, what: str, manifest: Manifest, **fields: Any) -> Promise:
        """Notes a promise, and checks that it can be kept."""
        contents = frozenset(contents_of(manifest))
        made = Promise(what=what, digest=manifest.digest, contents=contents, **fields)
        self.promises.append(made)
        self.manifests[manifest.digest] = manifest
        if made.stands(self.world.now):
            if manifest.path not in self.network.files:
                self.violate(f"{what}: manifest {manifest.digest[:8]} is not there")
            for content in contents - self.tainted:
                if not self.readable(content):
                    self.violate(f"{what}: clip {number_of(content[0])} cannot be read")
        return made

    def winners(self) -> dict[str, str]:
        """Key -> commit id that every reader must see, as things are now."""
        found: dict[str, str] = {}
        for identifier in sorted(self.paths):
            for key, _, _ in self.rows[identifier]:
                if (key, identifier) not in self.taken_back:
                    found.setdefault(key, identifier)
        return found

    def looked_up(
        self, who: str, found: dict[str, Entry], taken_back: frozenset[tuple[str, str]]
    ) -> None:
        """An index that was loaded after `taken_back` was written has these entries."""
        for key, entry in found.items():
            if (key, entry.commit) in taken_back:
                self.violate(f"{who} sees clip {number_of(key)} of {entry.commit}, in quarantine")

    def garbage(self) -> list[str]:
        """What is in the store at the end and should not be: nothing but pins is needed then."""
        digests = {promise.digest for promise in self._standing()}
        for path, data in self.network.files.items():
            if path.startswith("pins/"):  # also of those who died before they knew
                digests.add(json.loads(data)["manifest"])
        needed = {
            content
            for digest in digests
            for content in contents_of(self.manifests[digest])
            if self.readable(content)
        }
        manifests = {f"manifests/{digest}.parquet" for digest in digests}
        first: dict[Content, str] = {}
        for identifier in sorted(self.paths):
            for key, blake3, _ in self.rows[identifier]:
                if (key, blake3) in needed and (key, identifier) not in self.taken_back:
                    first.setdefault((key, blake3), identifier)
        # A later copy is as good: which of them stays depends on what was condemned when.
        homes = {c for c in self.paths if any((k, b) in needed for k, b, _ in self.rows[c])}
        keep = {self.paths[c] for c in homes}
        keep |= {pack for c in homes for _, _, pack in self.rows[c]}
        found = []
        for path in self.network.names:
            folder = path.partition("/")[0]
            if folder in ("pins", "snapshots", "quarantine") or path in keep or path in manifests:
                continue
            found.append(path)
        copies = {c: 0 for c in needed}
        for identifier in homes:
            for key, blake3, _ in self.rows[identifier]:
                if (key, blake3) in copies and (key, identifier) not in self.taken_back:
                    copies[key, blake3] += 1
        if len(homes) > len(needed):
            found.append(f"{len(homes)} commits for {len(needed)} contents")
        return found


def contents_of(manifest: Manifest) -> Iterator[Content]:
    return ((row.entry.key, row.entry.blake3) for row in manifest.rows if row.entry is not None)


__all__ = ["KEYS", "Ledger", "Promise", "Work", "contents_of", "lives"]
