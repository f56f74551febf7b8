"""`crab cache ...` as people start it: what it says, what it changes, and how it ends."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from cache_samples import entry, equal_to_stored, key
from servers.seaweedfs import S3Server
from support.media_files import counting_clip, tone

from crab_platform import commits, snapshots
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestRow, write_manifest
from crab_platform.clock import Clock
from crab_platform.commits import Writer
from crab_platform.garbage import DAY_S
from crab_platform.leases import LeaseHolder
from crab_platform.packs import Entry, new_entry
from crab_platform.storage import open_store
from crab_platform.trust import Signer, Trust
from crab_platform.usage import Usage, encoder_label, read_usage, write_usage
from crab_platform.work import DecodeTask
from jobs import cli

Crab = Callable[..., tuple[int, Any, str]]


class Ago(Clock):
    """A clock that is behind: what is made with it is old."""

    def __init__(self, days: float) -> None:
        self._behind_ns = int(days * DAY_S * 1e9)

    def time_ns(self) -> int:
        return super().time_ns() - self._behind_ns


@pytest.fixture
def crab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Crab:
    """Runs a command in this process: (exit code, what --json printed, what people saw)."""

    def run(*arguments: object, as_json: bool = True) -> tuple[int, Any, str]:
        words = ["crab", *map(str, arguments), *(["--json"] if as_json else [])]
        monkeypatch.setattr("sys.argv", words)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        code = left.value.code
        assert isinstance(code, int)
        return code, json.loads(said.out) if as_json and said.out else said.out, said.err

    return run


def manifest_of(cache: FeatureCache, entries: list[Entry], first: int = 0) -> Manifest:
    return write_manifest(
        cache.store,
        [
            ManifestRow(
                source=f"set/clip-{first + n}.mp4",
                stream="video",
                status="ready",
                media_sha256=key(first + n).media_sha256,
                entry=one,
            )
            for n, one in enumerate(entries)
        ],
    )


def spec_of(folder: Path, cache: Any, **more: Any) -> Path:
    """A preprocess spec over folder/media."""
    path = folder / "spec.yaml"
    values = {
        "job": "preprocess",
        "name": "media",
        "data": [{"name": "media", "files": str(folder / "media")}],
        "cache": cache,
    }
    path.write_text(yaml.safe_dump(values | more))
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def shared(tmp_path: Path) -> FeatureCache:
    """Two teams' entries and what their jobs told: 6 of `vision`, 4 of `sound`, one of these a duplicate."""
    store = open_store(tmp_path / "cache")
    vision = FeatureCache(store, writer=Writer(run="r1", experiment="e", team="vision"))
    sound = FeatureCache(store, writer=Writer(run="r2", experiment="e", team="sound"))
    made = vision.commit([replace(entry(n), decode_s=3.0, encode_s=6.0) for n in range(6)])
    sound.commit([entry(n) for n in range(5, 9)])
    manifest = manifest_of(vision, made)
    label = encoder_label(entry(0).record)
    common: dict[str, Any] = {"kind": "preprocess", "experiment": "e", "manifest": manifest.digest}
    write_usage(store, Usage(job="one", run="r1", team="vision", encoded={label: 6}, **common))
    write_usage(
        store,
        Usage(
            job="two",
            run="r2",
            team="sound",
            hits={label: 9},
            encoded={label: 3},
            saved_decode_s=3600.0,
            saved_encode_s=7200.0,
            device="cuda",
            **common,
        ),
    )
    return vision


def test_stat_counts_by_team_and_by_encoder(shared: FeatureCache, crab: Crab) -> None:
    code, found, said = crab("cache", "stat", shared.store.url, "--by", "team")
    assert code == 0
    size = sum(
        one.length for one in shared.index().lookup([key(n).digest for n in range(6)]).values()
    )
    vision, sound = found["groups"]["vision"], found["groups"]["sound"]
    assert (vision["entries"], vision["bytes"], vision["hits"], vision["encoded"]) == (
        6,
        size,
        0,
        6,
    )
    assert (vision["decode_s"], vision["encode_s"], vision["hit_ratio"]) == (18.0, 36.0, 0.0)
    assert (sound["entries"], sound["hits"], sound["hit_ratio"]) == (3, 9, 0.75)
    assert (sound["cpu_hours_saved"], sound["gpu_hours_saved"]) == (1.0, 2.0)
    assert found["total"]["entries"] == 9
    assert found["total"]["hit_ratio"] == 0.5
    assert (found["duplicates"], found["conflicts"], found["quarantined"]) == (1, [], 0)
    assert (found["commits"], found["packs"], found["jobs"]) == (2, 2, 2)
    assert found["alarms"] == []
    assert "vision" in said

    _, by_encoder, _ = crab("cache", "stat", shared.store.url)
    (group,) = by_encoder["groups"].values()
    assert list(by_encoder["groups"]) == ["test 00000000"]
    assert (group["entries"], group["hits"], group["gpu_hours_saved"]) == (9, 9, 2.0)


def test_stat_of_the_last_days_and_in_money(tmp_path: Path, crab: Crab) -> None:
    store = open_store(tmp_path / "cache")
    FeatureCache(store, clock=Ago(10)).commit([entry(1), entry(2)])
    FeatureCache(store).commit([entry(3)])
    usage = Usage(kind="train", job="t", saved_decode_s=36000.0, hits={"a": 1})
    write_usage(store, usage, Ago(10))
    write_usage(store, usage)
    code, found, _ = crab("cache", "stat", store.url, "--since", 2, "--profile", "aws-example")
    assert code == 0
    assert (found["total"]["entries"], found["jobs"], found["packs"]) == (1, 1, 2)
    assert found["total"]["money_saved"] > 0
    assert crab("cache", "stat", store.url, "--by", "colour")[0] == 2


def test_stat_is_loud_about_strangers_and_conflicts(tmp_path: Path, crab: Crab) -> None:
    store = open_store(tmp_path / "cache")
    other = new_entry(key(1), {name: a + 1 for name, a in entry(1).arrays.items()})
    FeatureCache(store).commit([entry(1)])
    FeatureCache(store).commit([other])
    code, found, said = crab("cache", "stat", store.url)
    assert code == 0
    assert found["conflicts"] == [key(1).digest]
    assert "ALARM: 1 keys have entries that differ" in said

    _, made, _ = crab("cache", "keygen", tmp_path / "a.key")
    (tmp_path / "media").mkdir()
    spec = spec_of(tmp_path, {"url": store.url, "trust": {"a": made["public_key"]}})
    code, found, said = crab("cache", "stat", spec)
    assert (code, found["skipped_commits"], found["total"]["entries"]) == (0, {"unsigned": 2}, 0)
    assert "ALARM: 2 commits are not used: unsigned" in said


def test_stat_names_commits_that_were_not_used_in_layers_too(tmp_path: Path, crab: Crab) -> None:
    public = {}
    for zone in ("ours", "theirs"):
        _, made, _ = crab("cache", "keygen", tmp_path / zone)
        public[zone] = made["public_key"]
    below = open_store(tmp_path / "below")
    theirs = Signer("theirs", str(tmp_path / "theirs"))
    for number in range(11):
        FeatureCache(below, signer=theirs).commit([entry(number)])
    FeatureCache(open_store(tmp_path / "cache")).commit([entry(20)])
    (tmp_path / "media").mkdir()
    cache = {
        "url": str(tmp_path / "cache"),
        "zone": "ours",
        "trust": {"ours": public["ours"]},
        "read_through": [below.url],
    }
    spec = spec_of(tmp_path, cache)
    code, found, said = crab("cache", "stat", spec)
    assert code == 0
    told = [(one["cache"], one["reason"], one["count"]) for one in found["not_used_commits"]]
    assert told == [
        (str(tmp_path / "cache"), "unsigned", 1),
        (below.url, "zone_not_trusted", 11),
    ]
    first = found["not_used_commits"][1]["first"]
    newest = sorted(below.list(commits.COMMITS), reverse=True)[:10]
    assert [one["path"] for one in first] == newest
    assert {one["zone"] for one in first} == {"theirs"}
    assert f"11 commits of {below.url}" in said
    assert f"{first[0]['identifier']}, zone theirs" in said
    assert "and 1 older" in said

    for command in (["plan", spec], ["cache", "why", spec, "--spec", spec]):
        _, _, said = crab(*command)
        assert "11 zone_not_trusted" in said
        assert "`crab cache stat " in said


def test_stat_of_a_folder_that_is_no_cache_and_of_an_empty_one(tmp_path: Path, crab: Crab) -> None:
    (tmp_path / "cache").mkdir()
    code, _, said = crab("cache", "stat", tmp_path / "cache")
    assert (code, "empty" in said) == (0, True)
    (tmp_path / "cache" / "notes.txt").write_text("mine")
    code, _, said = crab("cache", "stat", tmp_path / "cache")
    assert (code, "holds no cache" in said) == (2, True)


def test_stat_tells_leases_of_jobs_at_work_from_manifests_that_are_kept(
    shared: FeatureCache, crab: Crab
) -> None:
    (digest,) = (path[10:-8] for path in shared.store.list("manifests"))
    LeaseHolder(shared.store, "looks-up").renew(seen=())
    LeaseHolder(shared.store, "reads").renew(manifests=(digest,))
    ended = LeaseHolder(shared.store, "ended")
    ended.renew(seen=())
    ended.leave(7 * DAY_S, [digest])
    _, found, said = crab("cache", "stat", shared.store.url)
    assert (found["leases"], found["leases_of_jobs_at_work"]) == (3, 2)
    assert "2 of jobs at work, 1 keep" in re.sub(r"[\s│]+", " ", said)


def test_damage_is_found_taken_back_and_computed_anew(shared: FeatureCache, crab: Crab) -> None:
    url = shared.store.url
    code, found, _ = crab("cache", "verify", url, "--all")
    assert (code, found["checked"], found["bad"]) == (0, 10, [])
    bad = shared.index().lookup([key(2).digest])[key(2).digest]
    flip(Path(url) / bad.pack, bad.offset + 7)

    code, found, said = crab("cache", "verify", url, "--all")
    assert code == 1
    assert [(one["key"], one["reason"]) for one in found["bad"]] == [(bad.key, "corrupt")]
    # It says what to do next, and that does it.
    line = re.search(r"Next: crab (cache verify .*? --quarantine)", said.replace("\n", " "))
    assert line is not None
    code, found, said = crab(*line.group(1).split())
    assert (code, len(found["bad"])) == (1, 1)
    assert found["quarantine"].startswith("quarantine/")
    assert bad.key not in shared.index()
    assert crab("cache", "verify", url, "--all")[0] == 0
    assert crab("cache", "stat", url)[1]["quarantined"] == 1

    shared.commit([entry(2)])
    again = shared.index().lookup([bad.key])[bad.key]
    assert equal_to_stored(shared.read([again])[0], 2)
    assert crab("cache", "verify", url, "--all")[1]["checked"] == 10


def test_a_sample_has_at_least_one_and_repeats_with_its_seed(
    shared: FeatureCache, crab: Crab
) -> None:
    _, one, _ = crab("cache", "verify", shared.store.url, "--sample", 0.000001)
    assert (one["checked"], one["entries"]) == (1, 10)
    some = [crab("cache", "verify", shared.store.url, "--sample", 0.5)[1] for _ in range(8)]
    assert len({found["seed"] for found in some}) == 8
    assert len({found["bytes"] for found in some}) > 1
    again = crab("cache", "verify", shared.store.url, "--sample", 0.5, "--seed", some[0]["seed"])[1]
    assert again["bytes"] == some[0]["bytes"]
    assert crab("cache", "verify", shared.store.url, "--sample", 0)[0] == 2


def test_what_the_encoders_of_a_spec_compute_today_is_compared(tmp_path: Path, crab: Crab) -> None:
    """Real clips, the real decoder and the tiny encoders, in this process."""
    from jobs.preprocess import build_work
    from jobs.spec import PreprocessSpec, load_spec

    folder = tmp_path / "media"
    folder.mkdir()
    clips = [
        counting_clip(folder / f"{n}.mkv", 2 + n, samples=tone([300.0 + 50 * n] * (2 + n)))
        for n in range(3)
    ]
    spec = spec_of(tmp_path, {"url": str(tmp_path / "cache")}, encoders={"store_as": "int8"})
    parsed = load_spec(spec)
    assert isinstance(parsed, PreprocessSpec)
    work = build_work(parsed)
    decoder = work.make_decoder()
    cache = work.open_cache()
    made = []
    for clip in clips:
        sha256 = sha256_of(clip)
        requests = {name: work.streams[name].request for name in ("video", "audio")}
        for name, window in decoder(DecodeTask(path=str(clip), requests=requests)).items():
            todo = work.streams[name]
            features = todo.make_encoder()(window)
            if clip is clips[2] and name == "audio":  # planted: wrong, and consistent in itself
                features = {one: array * 1.2 for one, array in features.items()}
            made.append(
                new_entry(
                    work.key(name, sha256),
                    features,
                    source_url=str(clip),
                    device="cpu",
                    tolerance=todo.tolerance,
                )
            )
            if name == "video":
                made.append(
                    new_entry(
                        work.decoded_key(name, sha256), {"window": window}, source_url=str(clip)
                    )
                )
    cache.commit(made)
    url = cache.store.url
    assert crab("cache", "verify", url, "--all")[0] == 0  # every digest is in order

    code, found, _ = crab("cache", "verify", spec, "--all", "--recompute", spec)
    assert (code, found["checked"], found["recomputed"]) == (1, 9, 9)
    (bad,) = found["bad"]
    assert (Path(bad["source"]).name, bad["reason"]) == ("2.mkv", "recomputed_otherwise")
    assert found["largest_error"] < 0.004

    clips[0].rename(tmp_path / "elsewhere.mkv")
    clips[2].write_bytes(clips[1].read_bytes())
    code, found, said = crab("cache", "verify", url, "--all", "--recompute", spec)
    assert (code, found["recomputed"], found["bad"]) == (0, 3, [])
    reasons = [(Path(o["source_url"]).name, o["reason"]) for o in found["not_recomputed"]]
    assert sorted(set(reasons)) == [("0.mkv", "media_gone"), ("2.mkv", "media_changed")]
    assert "no fault of the entries" in said

    coarser = spec_of(tmp_path, {"url": url}, sampling={"num_frames": 5, "num_segments": 5})
    code, found, _ = crab("cache", "verify", url, "--all", "--recompute", coarser)
    assert (code, found["recomputed"], found["other_settings"]) == (0, 0, 9)


def sha256_of(path: Path) -> str:
    from crab_platform.identity import sha256_hex

    return sha256_hex(path.read_bytes())


def test_garbage_is_told_condemned_and_deleted_days_later(tmp_path: Path, crab: Crab) -> None:
    store = open_store(tmp_path / "cache")
    old = FeatureCache(store, clock=Ago(30), pack_bytes=1)
    kept, leased, _ = old.commit([entry(1), entry(2), entry(3)])
    pinned = manifest_of(old, [kept], 1)
    used = manifest_of(old, [leased], 2)
    lease = LeaseHolder(store, "train-x", "ana@host")
    lease.renew(manifests=(used.digest,))
    code, pin, _ = crab("cache", "pin", store.url, pinned.digest[:10], "--project", "p")
    assert (code, pin["manifest"], pin["name"]) == (0, pinned.digest, pinned.digest[:12])

    files = store.list()
    code, found, said = crab("cache", "gc", store.url)
    assert (code, found["applied"]) == (0, False)
    assert found["condemned"] == {
        "in no manifest of a lease or pin": {
            "files": 1,
            "bytes": old.index().lookup([key(3).digest])[key(3).digest].length,
        }
    }
    assert [one["job"] for one in found["leases"]] == ["train-x"]
    assert "ana@host" in said
    assert "Nothing was changed" in said
    assert store.list() == files

    assert crab("cache", "gc", store.url, "--apply")[1]["applied"]
    assert len(FeatureCache(store).index()) == 3  # nothing is deleted by the pass that condemns
    (condemned,) = store.list("condemned")
    code, found, _ = crab("cache", "gc", store.url, "--apply")
    assert len(found["waiting"]) == 1
    # Four days later.
    data = store.read(condemned)
    store.delete(condemned)
    store.create(f"condemned/{Ago(4).new_id()}.parquet", data)
    code, found, _ = crab("cache", "gc", store.url, "--apply")
    assert sum(one["files"] for one in found["deleted"].values()) == 2  # the commit and its pack
    assert sorted(FeatureCache(store).index()) == sorted([key(1).digest, key(2).digest])
    assert crab("cache", "verify", store.url, "--all")[0] == 0
    assert crab("cache", "gc", store.url, "--grace-days", 0.01)[0] == 2


def test_a_pinned_manifest_that_is_not_there_is_told(tmp_path: Path, crab: Crab) -> None:
    store = open_store(tmp_path / "cache")
    cache = FeatureCache(store)
    manifest = manifest_of(cache, cache.commit([entry(1)]))
    crab("cache", "pin", store.url, manifest.digest, "--project", "p")
    store.delete(manifest.path)
    _, found, said = crab("cache", "gc", store.url)
    assert found["missing_manifests"] == [manifest.digest]
    assert "ALARM: manifest" in said
    assert "run the preprocess job" in said
    _, found, said = crab("cache", "compact", store.url)
    assert found["missing_manifests"] == [manifest.digest]
    assert "nothing is put together" in said


def test_pins_begin_and_end_by_name(shared: FeatureCache, tmp_path: Path, crab: Crab) -> None:
    url, runs = shared.store.url, tmp_path / "runs"
    (digest,) = (path[10:-8] for path in shared.store.list("manifests"))
    (runs / "prep").mkdir(parents=True)
    (runs / "prep" / "result.json").write_text(
        json.dumps({"manifest": digest, "job": "preprocess"})
    )
    code, pin, _ = crab(
        *("cache", "pin", url, "prep", "--project", "demo", "--reason", "paper", "--runs", runs)
    )
    assert (code, pin["name"], pin["manifest"], pin["reason"]) == (0, "prep", digest, "paper")
    code, pins, _ = crab("cache", "pins", url)
    assert [(one["project"], one["name"]) for one in pins] == [("demo", "prep")]

    code, _, said = crab("cache", "pin", url, "preb", "--project", "demo", "--runs", runs)
    assert (code, "did you mean 'prep'?" in said) == (2, True)
    code, _, said = crab("cache", "pin", url, "0" * 64, "--project", "demo")
    assert (code, "has no manifest" in said) == (2, True)
    code, _, said = crab("cache", "unpin", url, "demo/other")
    assert (code, "demo/prep" in said) == (2, True)
    assert crab("cache", "unpin", url, "demo/prep")[0] == 0
    assert crab("cache", "pins", url)[1] == []


def test_a_pin_of_features_that_are_gone_says_so_and_holds_what_comes_back(
    shared: FeatureCache, crab: Crab
) -> None:
    (digest,) = (path[10:-8] for path in shared.store.list("manifests"))
    for path in (*shared.store.list(commits.COMMITS), *shared.store.list(commits.PACKS)):
        shared.store.delete(path)
    code, _, said = crab("cache", "pin", shared.store.url, digest, "--project", "p")
    assert (code, "are deleted" in said) == (1, True)
    assert len(shared.store.list("pins")) == 1


def test_a_key_is_made_once_and_says_what_to_put_into_specs(tmp_path: Path, crab: Crab) -> None:
    file = tmp_path / "new" / "a.key"
    code, text, _ = crab("cache", "keygen", file, as_json=False)
    assert code == 0
    assert file.stat().st_mode & 0o077 == 0
    public = Signer("a", str(file)).public_key
    assert f"trust: {{NAME: {public}}}" in text
    assert file.read_text().strip() not in text
    before = file.read_text()
    assert crab("cache", "keygen", file)[0] == 2
    assert file.read_text() == before


def test_snapshots_hold_what_none_held_and_old_ones_go(
    tmp_path: Path, crab: Crab, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path / "cache")
    cache = FeatureCache(store, pack_bytes=1)
    cache.commit([entry(n) for n in range(6)])
    assert crab("cache", "snapshot", store.url)[1]["commits"] == 0  # too few to be worth it
    monkeypatch.setattr(snapshots, "ROWS", 4)
    assert crab("cache", "snapshot", store.url, "--all")[1]["commits"] == 6
    assert len(store.list("snapshots")) == 2
    assert crab("cache", "snapshot", store.url, "--all")[1]["commits"] == 0
    assert sorted(cache.index()) == sorted(key(n).digest for n in range(6))
    # Three of the first snapshot's four commits go.
    for path in store.list(commits.COMMITS)[:3]:
        store.delete(path)
    assert crab("cache", "snapshot", store.url, "--all")[1]["commits"] == 1
    held = snapshots.held_commits(store)
    assert sorted(len(one) for one in held.values()) == [1, 2]
    assert len(cache.index()) == 3

    crab("cache", "keygen", tmp_path / "a.key")
    public = Signer("a", str(tmp_path / "a.key")).public_key
    (tmp_path / "media").mkdir()
    spec = spec_of(tmp_path, {"url": store.url, "trust": {"a": public}})
    code, _, said = crab("cache", "snapshot", spec, "--all")
    assert (code, "must be signed" in said) == (2, True)
    spec = spec_of(tmp_path, {"url": store.url, "trust": {"a": public}, "zone": "a"})
    assert crab("cache", "snapshot", spec, "--all")[0] == 2  # whose key is not at hand
    monkeypatch.setenv("CRAB_CACHE_SIGNING_KEY", str(tmp_path / "a.key"))
    signed = FeatureCache(
        store, signer=Signer("a", str(tmp_path / "a.key")), trust=Trust({"a": public})
    )
    signed.commit([entry(1)])
    assert crab("cache", "snapshot", spec, "--all")[1]["commits"] == 1
    assert len(signed.index()) == 1


@pytest.fixture
def history(shared: FeatureCache, tmp_path: Path) -> dict[str, Any]:
    """A preprocess, a train and an evaluate job over one manifest; the first told by the cache alone."""
    (digest,) = (path[10:-8] for path in shared.store.list("manifests"))
    runs = tmp_path / "runs"
    adapter = runs / "train" / "abc" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "crab.json").write_text(json.dumps({"lineage": {"manifest": digest}}))
    (adapter / "trained.safetensors").write_bytes(b"weights")
    for kind, name in (("train", "train"), ("evaluate", "scores")):
        (runs / name).mkdir(exist_ok=True)
        result = {
            "job": kind,
            "name": name,
            "manifest": digest,
            "adapter": str(adapter),
            "mlflow_run": f"{len(name):032x}",
        }
        (runs / name / "result.json").write_text(json.dumps(result))
    return {"digest": digest, "runs": runs, "adapter": adapter, "cache": shared.store.url}


def test_lineage_from_an_adapter_to_its_clips(history: dict[str, Any], crab: Crab) -> None:
    common = ("--cache", history["cache"], "--runs", history["runs"], "--first", 2)
    for what, is_a in ((history["adapter"], "adapter"), ("train", "run"), (f"{5:032x}", "run")):
        code, found, _ = crab("cache", "lineage", what, *common)
        assert (code, found["is_a"]) == (0, is_a)
        # Two preprocess jobs made this manifest, as their usage files say.
        kinds = [job["kind"] for job in found["jobs"]]
        assert sorted(kinds) == ["evaluate", "preprocess", "preprocess", "train"]
        count = found["manifests"][history["digest"]]
        assert (count["clips"], count["streams"]) == (6, 6)
        assert count["first"] == ["set/clip-0.mp4", "set/clip-1.mp4"]
        assert crab("cache", "lineage", what, *common, as_json=False)[2].count("and 4 more") == 1


def test_lineage_from_a_clip_to_the_adapters_that_have_seen_it(
    history: dict[str, Any], tmp_path: Path, crab: Crab
) -> None:
    common = ("--cache", history["cache"], "--runs", history["runs"])
    for what in ("set/clip-3.mp4", "clip-3.mp4", key(3).media_sha256):
        code, found, _ = crab("cache", "lineage", what, *common)
        assert (code, found["is_a"]) == (0, "clip")
        assert [row["source"] for row in found["clip_rows"]] == ["set/clip-3.mp4"]
        assert {job["adapter_folder"] for job in found["jobs"] if job["kind"] == "train"} == {
            str(history["adapter"])
        }
    code, found, _ = crab("cache", "lineage", history["digest"][:12], *common)
    assert (found["is_a"], len(found["jobs"])) == ("manifest", 4)
    code, _, said = crab("cache", "lineage", "clip-77.mp4", *common)
    assert (code, "--cache" in said) == (2, True)


def test_usage_files_that_cannot_be_read_are_told(shared: FeatureCache, crab: Crab) -> None:
    shared.store.create("usage/0000000000000000-0000000000000000.json", b"{}")
    skipped: dict[str, str] = {}
    assert len(list(read_usage(shared.store, skipped))) == 2
    assert len(skipped) == 1
    assert len(crab("cache", "stat", shared.store.url)[1]["unreadable_usage"]) == 1


def test_on_s3(s3: S3Server, crab: Crab) -> None:
    url = s3.url(f"commands/{secrets.token_hex(4)}")
    cache = FeatureCache(open_store(url))
    manifest = manifest_of(cache, cache.commit([entry(n) for n in range(5)]))
    assert crab("cache", "stat", url)[1]["total"]["entries"] == 5
    assert crab("cache", "verify", url, "--all")[1]["checked"] == 5
    assert crab("cache", "pin", url, manifest.digest, "--project", "p")[0] == 0
    assert crab("cache", "gc", url)[1]["condemned"] == {}
    assert crab("cache", "snapshot", url, "--all")[1]["commits"] == 1


def test_a_cache_that_is_not_there_is_wrong_input(tmp_path: Path, crab: Crab) -> None:
    code, _, said = crab("cache", "stat", tmp_path / "typo")
    assert (code, "there is no cache in" in said) == (2, True)
    assert crab("cache", "stat", "ftp://host/x")[0] == 2
    (tmp_path / "media").mkdir()
    spec = spec_of(tmp_path, str(tmp_path))
    spec.write_text(yaml.safe_dump({"job": "synth", "name": "s", "out": "x"}))
    code, _, said = crab("cache", "stat", spec)
    assert (code, "names no cache" in said) == (2, True)


@pytest.mark.parametrize(
    "command", ["stat", "verify", "gc", "pin", "unpin", "keygen", "snapshot", "lineage"]
)
def test_help_has_an_example(command: str, crab: Crab) -> None:
    code, text, _ = crab("cache", command, "--help", as_json=False)
    assert code == 0
    assert f"crab cache {command} " in re.sub(r"\s+", " ", text)
