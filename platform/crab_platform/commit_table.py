"""Every commit of a cache and what it holds, as garbage collection and compaction look at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from crab_platform.cache import load_index
from crab_platform.commits import COMMITS
from crab_platform.identity import WINDOW
from crab_platform.quarantine import read_quarantine
from crab_platform.storage import Store
from crab_platform.trust import Trust, parse_path

Content = bytes
"""What an entry is, wherever it lies: half of its key and half of its BLAKE3, 32 bytes in all."""

TWICE = "two commits of one id"


def content_of(key: str, blake3: str) -> Content:
    """From both digests in hex: 128 bits of each, so two are never the same by chance, and millions fit in memory."""
    return bytes.fromhex(key[:32] + blake3[:32])


@dataclass(frozen=True, kw_only=True)
class CommitTable:
    """What every commit of a store holds, by its path."""

    commits: dict[str, list[Content]]
    """Without what is in quarantine."""
    packs: dict[str, set[str]]
    """Commit -> the packs that its rows name; one, of those that we wrote."""
    windows: dict[Content, str]
    """Decoded windows, which stand in no manifest -> SHA-256 of their media."""
    ids: dict[str, str]
    zones: dict[str, str]
    taken_back: set[str]
    """Ids of commits of which something is in quarantine."""
    left_alone: dict[str, str]
    """Path -> reason: of other zones, wrongly signed (or is our key the wrong one?), of a newer version, unreadable,
    of an id that stands twice. Not ours to judge."""

    @classmethod
    def load(cls, store: Store, trust: Trust) -> CommitTable:
        """Reads every commit."""
        names = [name for path in store.list(COMMITS) if (name := parse_path(path)) is not None]
        index = load_index(store, trust, with_snapshots=False)
        count = Counter(name.identifier for name in names)
        path_of = {name.identifier: name.path for name in names if count[name.identifier] == 1}
        twice = {name.path: TWICE for name in names if count[name.identifier] > 1}
        skipped = index.skipped_commits
        table = cls(
            commits={},
            packs={},
            windows={},
            ids={name.path: name.identifier for name in names},
            zones={name.path: name.zone for name in names},
            taken_back={entry.commit for _, entry in read_quarantine(store, trust)},
            left_alone=skipped | twice,
        )
        for entry, media in index.entries_with_media():
            # One that came since the listing is young: it is never condemned, but its pack is alive.
            path = path_of.get(entry.commit, f"{COMMITS}/{entry.commit}")
            table.ids.setdefault(path, entry.commit)
            table.zones.setdefault(path, "")
            content = content_of(entry.key, entry.blake3)
            table.commits.setdefault(path, []).append(content)
            table.packs.setdefault(path, set()).add(entry.pack)
            if [spec.name for spec in entry.tensors] == [WINDOW]:
                table.windows[content] = media
        return table

    def kept(self, needed: Iterable[Content], *, exclude: set[str]) -> set[str]:
        """Commits that hold the earliest copy, of each zone, of something that is needed."""
        wanted = set(needed)
        had: dict[str, set[Content]] = {}
        kept: set[str] = set()
        for path in sorted(self.commits, key=self.ids.__getitem__):
            if path in exclude:
                continue
            seen = had.setdefault(self.zones[path], set())
            new = wanted.intersection(self.commits[path]) - seen
            if new:
                kept.add(path)
                seen |= new
        return kept
