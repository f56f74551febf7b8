"""Eight processes make the features of the same clips on S3 at the same moment.

Each is a whole job with leases, decode children, packs and a manifest. They agree on one entry a clip, nobody sees an
error, and what was made eight times is garbage that garbage collection removes. Readers with a planted bug are found.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from servers.seaweedfs import S3Server
from support.cheap_clips import make_clips
from support.crab_runs import ROOT
from support.racer import LAST_COMMIT, NO_SETTLE
from support.small_jobs import DAY_S, Encoders, Later, parse, spec_record

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS, read_manifest
from crab_platform.garbage import DUPLICATE, Collector
from crab_platform.manifest_reader import ManifestReader
from jobs.caches import open_cache

PROCESSES = 8
QUICK_CLIPS = 40
FULL_CLIPS = 500
PLANTED_CLIPS = 8
PLANTED = (NO_SETTLE, LAST_COMMIT)
VIEWS = ("in_rows", "in_manifest", "in_index")
"""What a job put into its manifest, the manifest that came of it, and a fresh index at its end."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What the processes left, and what each of them saw at its end."""

    record: dict[str, Any]
    seen: list[dict[str, Any]]

    def cache(self) -> FeatureCache:
        return open_cache(parse(self.record).cache)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def quick(
    s3: S3Server, encoders: Encoders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Race]:
    """A race of the product as it is, and one with each planted bug."""
    folder = tmp_path_factory.mktemp("race")
    clips = make_clips(folder / "clips", QUICK_CLIPS)
    few = make_clips(folder / "few", PLANTED_CLIPS)
    asked = [{"clips": clips, "clips_per_pack": 8}]
    asked += [{"clips": few, "clips_per_pack": 4, "planted": planted} for planted in PLANTED]
    runs = run_races(s3, encoders, folder / "out", *asked)
    return dict(zip(("", *PLANTED), runs, strict=True))


def run_races(s3: S3Server, encoders: Encoders, out: Path, *asked: dict[str, Any]) -> list[Race]:
    """Races one after the other, from one launcher."""
    requests = []
    for number, one in enumerate(asked):
        url = s3.url(f"race/{secrets.token_hex(6)}")
        pipeline = {"clips_per_pack": one["clips_per_pack"]}
        record = spec_record(one["clips"], url, encoders.record(), pipeline=pipeline)
        folder = out / str(number)
        folder.mkdir(parents=True)
        requests.append(
            {
                "spec": record,
                "processes": PROCESSES,
                "planted": one.get("planted", ""),
                "children": "planted" not in one,
                "out": str(folder),
            }
        )
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "platform", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", "support.racer", json.dumps(requests)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        Race(
            record=request["spec"],
            seen=[
                json.loads((Path(request["out"]) / f"{n}.json").read_text())
                for n in range(PROCESSES)
            ],
        )
        for request in requests
    ]


def problems(run: Race, num_clips: int) -> list[str]:
    """What users and readers would see of the race, now and after garbage collection."""
    if errors := [one["error"] for one in run.seen if one["error"]]:
        return errors
    cache = run.cache()
    found = []
    if len(digests := {one["digest"] for one in run.seen}) != 1:
        found.append(f"{len(digests)} manifests")
    first = first_commits(cache)
    if len(first) != 2 * num_clips:
        found.append(f"{len(first)} keys for {num_clips} clips")
    for view in VIEWS:
        wrong = Counter(
            "another entry" if key in first else "an unknown key"
            for one in run.seen
            for key, (commit, *_) in one[view].items()
            if commit != first.get(key)
        )
        found += [f"{view}: {what} {count} times" for what, count in wrong.items()]
        if any(one[view].keys() != first.keys() for one in run.seen):
            found.append(f"{view}: not every key")
    return found + problems_after_gc(run, cache)


def first_commits(cache: FeatureCache) -> dict[str, str]:
    """Key -> the earliest commit that has it, read here from the commits themselves."""
    first: dict[str, str] = {}
    for path in sorted(cache.store.list(commits.COMMITS)):
        identifier = path.rpartition("/")[2].partition(".")[0]
        for key in commits.read_commit(cache.store.read(path)).column("key").to_pylist():
            first.setdefault(key, identifier)
    return first


def problems_after_gc(run: Race, cache: FeatureCache) -> list[str]:
    """Two passes, days later: whatever a process saw must still be there, once."""
    store = cache.store
    later = Later(8 * DAY_S)
    condemned = Collector(store, clock=later).run(apply=True).condemned
    assert {why for path, why in condemned.items()} <= {DUPLICATE}
    later.ahead_s += 4 * DAY_S
    Collector(store, clock=later).run(apply=True)
    found = []
    copies = Counter(
        key
        for path in store.list(commits.COMMITS)
        for key in commits.read_commit(store.read(path)).column("key").to_pylist()
    )
    if twice := sum(count > 1 for count in copies.values()):
        found.append(f"{twice} keys in several commits after garbage collection")
    named = {entry.pack for entry in cache.index().entries()}
    if set(store.list(commits.PACKS)) != named:
        found.append("packs that no commit names after garbage collection")
    packs = set(store.list(commits.PACKS))
    for view in VIEWS:
        gone = sum(pack not in packs for one in run.seen for _, pack, *_ in one[view].values())
        if gone:
            found.append(f"{view}: {gone} entries are deleted")
    manifest = read_manifest(store, run.seen[0]["digest"])
    reader = ManifestReader(open_cache(parse(run.record).cache), manifest)
    arrays = reader.read([(row.source, row.stream) for row in manifest.rows])
    if len(arrays) != len(copies):
        found.append(f"{len(arrays)} features of {len(copies)} keys")
    return found


def check(run: Race, num_clips: int) -> None:
    assert problems(run, num_clips) == []
    # They did race: each made all of it, and all but one time of it was garbage.
    assert [one["encoded"] for one in run.seen] == [2 * num_clips] * PROCESSES
    assert all(one["set_aside"] == {} for one in run.seen)
    assert len(run.cache().store.list(MANIFESTS)) == 1
    print(f"{num_clips} clips; seconds of each: {[one['seconds']['wall'] for one in run.seen]}")


def test_eight_processes_agree_on_one_entry_a_clip(quick: dict[str, Race]) -> None:
    check(quick[""], QUICK_CLIPS)


@pytest.mark.parametrize("planted", PLANTED)
def test_readers_that_take_another_entry_are_found(quick: dict[str, Race], planted: str) -> None:
    found = problems(quick[planted], PLANTED_CLIPS)
    assert any(text.startswith("in_rows: another entry") for text in found)
    assert any(text.endswith("entries are deleted") for text in found)
    in_index = any(text.startswith("in_index: another entry") for text in found)
    assert in_index == (planted == LAST_COMMIT)


@pytest.mark.faults
def test_eight_processes_agree_on_500_clips(
    s3: S3Server, encoders: Encoders, tmp_path: Path
) -> None:
    clips = make_clips(tmp_path / "clips", FULL_CLIPS)
    (run,) = run_races(s3, encoders, tmp_path / "out", {"clips": clips, "clips_per_pack": 25})
    check(run, FULL_CLIPS)
