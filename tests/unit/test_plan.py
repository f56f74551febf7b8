"""What a plan says of each clip, and from what it estimates."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crab_platform.cache import FeatureCache
from crab_platform.catalog import ManifestRow, write_manifest
from crab_platform.commits import Writer
from crab_platform.cost import Prices
from crab_platform.estimate import estimate
from crab_platform.packs import Entry, NewEntry, new_entry
from crab_platform.plan import Aside, Clip, Plan, make_plan, set_aside_before
from crab_platform.quarantine import CORRUPT, bad_entry, write_quarantine
from crab_platform.storage import FolderStore
from crab_platform.trust import Trust, make_key
from crab_platform.work import PipelineConfig, StreamWork, Work

PRICES = Prices(
    currency="USD",
    cpu_hour=3.6,
    gpu_hour=36.0,
    storage_gb_month=0.02,
    put_per_1000=0.005,
    get_per_1000=0.0004,
    list_per_1000=0.005,
    egress_gb=0.09,
)
WRITER = Writer(run="run-1", experiment="heads", team="vision")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(FolderStore(tmp_path / "cache"), writer=WRITER)


def some_work(cache: FeatureCache, **changes: Any) -> Work:
    """Video and audio. `changes` are of the video stream; `decode` and `config` of the whole."""
    whole = {name: changes.pop(name) for name in ("decode", "config") if name in changes}
    video = StreamWork(
        stream="video",
        sampling={"num_frames": 10, "size": 224},
        encoder={"name": "clip", "weights_sha256": "aa" * 32, "layers": [1, 2]},
        dtype="float16",
        request=None,
        make_encoder=_never,
    )
    audio = replace(video, stream="audio", sampling={"num_segments": 10}, encoder={"name": "beats"})
    return Work(
        name="job",
        by="a test",
        open_cache=lambda: cache,
        streams={"video": replace(video, **changes), "audio": audio},
        make_decoder=_never,
        **{"decode": {"version": 1}, "config": PipelineConfig(), **whole},
    )


def _never() -> Any:
    raise AssertionError("a plan decodes and encodes nothing")


def media(number: int) -> str:
    return f"{number:064x}"


def clip(number: int, *streams: str, **changes: Any) -> Clip:
    return replace(
        Clip(
            name=f"clips/{number}.mp4",
            url=f"/media/{number}.mp4",
            streams=streams or ("video",),
            version=f"file:{1000 + number}:1:1:{number}",
            num_bytes=1000 + number,
        ),
        **changes,
    )


def encoded(work: Work, number: int, stream: str = "video", **changes: Any) -> NewEntry:
    known: dict[str, Any] = {
        "source_url": f"/media/{number}.mp4",
        "source_version": f"file:{1000 + number}:1:1:{number}",
        "decode_s": 2.0,
        "encode_s": 0.5,
        "device": "cpu",
    }
    arrays = {"x": np.full((4, 5), number, np.float32)}
    return new_entry(work.key(stream, media(number)), arrays, **known | changes)


def reasons(plan: Plan) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for counted in plan.groups:
        place = (counted.group.stream, counted.group.reason)
        found[place] = found.get(place, 0) + counted.count
    return found


def test_batched_digests_are_those_of_the_keys(cache):
    work = some_work(
        cache, codec="blosc2-shuffle-zstd1", encoder={"name": "ünïcode", "zeros": "0" * 64}
    )
    shas = [media(n) for n in (0, 1, 7, 2**200)]
    for name in work.streams:
        assert work.key_digests(name, shas) == [work.key(name, sha).digest for sha in shas]
        windows = [work.decoded_key(name, sha).digest for sha in shas]
        assert work.decoded_digests(name, shas) == windows


def test_a_miss_names_the_fields_that_differ_both_values_and_the_run(cache):
    work = some_work(cache)
    (entry,) = cache.commit([encoded(work, 1)])
    changed = some_work(
        cache, encoder={"name": "clip", "weights_sha256": "bb" * 32, "layers": [1, 2]}
    )

    (counted,) = make_plan(cache, changed, [clip(1)]).groups

    assert counted.count == 1
    assert counted.group.reason == "key_differs"
    assert counted.group.fields == (("encoder.weights_sha256", "aa" * 32, "bb" * 32),)
    ((origin, count),) = counted.origins
    assert (origin.run, origin.experiment, origin.team, count) == ("run-1", "heads", "vision", 1)
    assert origin.commit == entry.commit
    now = time.strftime("%Y-%m-%d", time.gmtime())
    assert origin.at.startswith(now)


def test_the_nearest_of_several_earlier_entries_is_told(cache):
    far = some_work(cache, dtype="float32", sampling={"num_frames": 3, "size": 112})
    near = some_work(cache, dtype="float32")
    for work in (near, far):
        cache.commit([encoded(work, 1)])

    (counted,) = make_plan(cache, some_work(cache), [clip(1)]).groups

    assert counted.group.fields == (("dtype", "float32", "float16"),)


def test_what_is_no_part_of_the_key_is_no_miss(cache):
    cache.commit([encoded(some_work(cache), 1)])
    elsewhere = some_work(cache, config=PipelineConfig(encode_actors=9, clips_per_pack=3))
    moved = clip(1, url="/elsewhere/a.mp4", name="other/name.mp4", sha256=media(1))
    assert reasons(make_plan(cache, elsewhere, [clip(1), moved])) == {("video", "hit"): 2}


def test_why_a_file_is_not_known(cache):
    work = some_work(cache)
    cache.commit([encoded(work, 1), encoded(work, 2, source_version="")])
    clips = [
        clip(1, version="file:5:9:9:1"),
        clip(2),
        clip(3),
        clip(4, problem="not_found"),
        clip(1, "audio"),
    ]

    plan = make_plan(cache, work, clips)

    assert reasons(plan) == {
        ("video", "file_changed"): 1,
        ("video", "version_unknown"): 1,
        ("video", "never_seen"): 1,
        ("video", "not_found"): 1,
        ("audio", "stream_new"): 1,
    }
    assert plan.statuses == {"hit": 0, "miss": 4, "set_aside": 1}
    assert (plan.to_read, plan.to_hash) == (4, 3)
    assert plan.bytes_to_read == 1001 + 1002 + 1003 + 1001


def test_hashing_turns_not_known_into_hit_or_changed_for_sure(cache):
    work = some_work(cache)
    cache.commit([encoded(work, 1), encoded(work, 2, source_version="")])
    asked: list[str] = []

    def hash_clips(clips):
        asked.extend(one.url for one in clips)
        shas = {"/media/1.mp4": media(7), "/media/2.mp4": media(2), "/media/3.mp4": media(3)}
        return [replace(one, sha256=shas[one.url]) for one in clips]

    clips = [clip(1, version="file:5:9:9:1"), clip(2), clip(3), clip(1)]
    plan = make_plan(cache, work, clips, hash_clips=hash_clips)

    assert asked == ["/media/1.mp4", "/media/2.mp4", "/media/3.mp4"]  # not the one that is known
    assert reasons(plan) == {
        ("video", "hit"): 2,
        ("video", "file_changed"): 1,
        ("video", "never_seen"): 1,
    }
    assert plan.to_hash == 0


def test_an_entry_in_quarantine_is_a_miss_that_says_so(cache):
    work = some_work(cache)
    (entry,) = cache.commit([encoded(work, 1)])
    write_quarantine(cache.store, [bad_entry(entry, CORRUPT, "a bit fell")])
    # What lies at the URL was known from that entry alone, and is not taken from it any more.
    assert reasons(make_plan(cache, work, [clip(1)])) == {("video", "in_quarantine"): 1}

    cache.commit([encoded(work, 1, "audio")])  # tells it again
    (counted,) = make_plan(cache, work, [clip(1)]).groups
    assert (counted.group.reason, counted.group.detail) == ("in_quarantine", "corrupt")


def test_commits_that_disagree_about_a_file_make_it_unsure(cache):
    work = some_work(cache)
    place = {"source_url": "/media/1.mp4", "source_version": clip(1).version}
    cache.commit([encoded(work, 1), encoded(work, 2, **place)])
    assert reasons(make_plan(cache, work, [clip(1)])) == {("video", "unsure"): 1}


def test_what_the_last_run_set_aside_is_told_for_the_same_media_only(cache):
    work = some_work(cache)
    (one,) = cache.commit([encoded(work, 1)])
    manifest = write_manifest(cache.store, [*_rows(one)])
    before = set_aside_before(cache.store, manifest.digest)
    assert before == {
        ("clips/1.mp4", "audio"): Aside(media_sha256=media(1), reason="no_audio_stream"),
        ("clips/2.mp4", "video"): Aside(media_sha256="", reason="not_found"),
    }

    clips = [clip(1, "video", "audio"), clip(2)]
    plan = make_plan(cache, work, clips, before=before)
    assert reasons(plan) == {
        ("video", "hit"): 1,
        ("audio", "set_aside_before"): 1,
        ("video", "never_seen"): 1,  # it was not there then, which says nothing of now
    }
    changed = clip(1, "audio", sha256=media(9))
    assert reasons(make_plan(cache, work, [changed], before=before)) == {
        ("audio", "file_changed"): 1
    }
    assert set_aside_before(cache.store, "0" * 64) == {}


def _rows(entry: Entry) -> list[ManifestRow]:
    common: dict[str, Any] = {"media_sha256": media(1)}
    lost: dict[str, Any] = {"status": "set_aside"}
    return [
        ManifestRow(source="clips/1.mp4", stream="video", status="ready", entry=entry, **common),
        ManifestRow(
            source="clips/1.mp4", stream="audio", reason="no_audio_stream", **lost, **common
        ),
        ManifestRow(source="clips/2.mp4", stream="video", reason="not_found", **lost),
    ]


def test_kept_windows_cost_no_decoding_and_are_no_earlier_entry(cache):
    old = some_work(cache)
    cache.commit([encoded(old, 1), encoded(old, 2)])
    window = {"window": np.zeros((2, 3), np.uint8)}
    cache.commit([new_entry(old.decoded_key("video", media(1)), window, decode_s=2.0)])
    new = some_work(cache, encoder={"name": "siglip"})

    plan = make_plan(cache, new, [clip(1), clip(2)])

    todo = plan.todo["video"]
    assert (todo.encode, todo.decode) == (2, 1)
    assert [outcome.decoded_kept for outcome in plan.sample] == [True, False]
    assert reasons(plan) == {("video", "key_differs"): 2}


def test_commits_that_are_not_trusted_are_counted_and_explain_nothing(cache, tmp_path):
    work = some_work(cache)
    cache.commit([encoded(work, 1)])
    careful = FeatureCache(cache.store, trust=Trust({"vision": make_key(tmp_path / "key")}))

    plan = make_plan(careful, work, [clip(1)])

    assert plan.skipped_commits == {"unsigned": 1}
    assert reasons(plan) == {("video", "never_seen"): 1}
    assert estimate(plan, work, None).cpu_s is None


def test_a_layer_below_gives_hits_and_explanations(cache, tmp_path):
    work = some_work(cache)
    cache.commit([encoded(work, 1), encoded(some_work(cache, dtype="float32"), 2)])
    mine = FeatureCache(FolderStore(tmp_path / "mine"), layers=[cache.store])

    plan = make_plan(mine, work, [clip(1), clip(2)])

    assert reasons(plan) == {("video", "hit"): 1, ("video", "key_differs"): 1}
    (outcome,) = plan.sample
    assert outcome.origin is not None
    assert outcome.origin.layer == cache.store.url


def test_every_clip_in_its_order_over_several_chunks(cache, monkeypatch):
    monkeypatch.setattr("crab_platform.plan.CHUNK", 3)
    work = some_work(cache)
    cache.commit([encoded(work, n) for n in range(0, 10, 2)])
    clips = [clip(n, "video", "audio") for n in range(10)]

    plan = make_plan(cache, work, clips, limit=4)

    outcomes = list(plan.outcomes(one.name for one in clips))
    assert [o.name for o in outcomes[::2]] == [one.name for one in clips]
    assert [o.group.status for o in outcomes[::2]] == ["hit", "miss"] * 5
    assert [o.group.stream for o in outcomes[:2]] == ["video", "audio"]
    assert len(plan.sample) == 4
    assert plan.streams == 20


def test_an_unknown_stream_is_refused(cache):
    with pytest.raises(ValueError, match="wants the stream 'smell'"):
        make_plan(cache, some_work(cache), [clip(1, "smell")])


class TestEstimates:
    def test_the_same_work_gives_its_measured_means(self, cache):
        work = some_work(cache)
        cache.commit([encoded(work, 1, decode_s=1.0), encoded(work, 2, decode_s=3.0, encode_s=1.5)])

        cost = estimate(make_plan(cache, work, [clip(1), clip(7), clip(8)]), work, PRICES)

        (video,) = cost.streams
        assert video.decode_s is not None
        assert (video.decode_s.mean, video.decode_s.entries, video.decode_s.differs) == (2.0, 2, ())
        assert video.decode_s.origin.run == "run-1"
        assert cost.cpu_s == pytest.approx(2 * (2.0 + 1.0))
        assert cost.gpu_s == 0
        assert cost.bytes_to_write == 2 * 40  # 4 x 5 numbers of float16
        assert cost.money is not None
        assert cost.money.compute == pytest.approx(6.0 * 3.6 / 3600)
        assert cost.wall_s == pytest.approx(4.0)  # decoding and encoding overlap
        assert video.verdict is not None
        assert cost.notes == ()

    def test_nothing_measured_gives_unknown_and_no_number(self, cache):
        work = some_work(cache)
        cost = estimate(make_plan(cache, work, [clip(1)]), work, PRICES)
        assert (cost.cpu_s, cost.bytes_to_write, cost.wall_s) == (None, None, None)
        assert cost.money is not None
        assert cost.money.total is None
        assert all("run it on a few clips first" in note for note in cost.notes)
        assert len(cost.notes) == 3

    def test_entries_of_an_old_commit_without_times_give_unknown(self, cache):
        work = some_work(cache)
        cache.commit([encoded(work, 1, decode_s=0.0, encode_s=0.0, device="")])
        cost = estimate(make_plan(cache, work, [clip(2)]), work, None)
        assert cost.cpu_s is None
        assert cost.bytes_to_write == 40
        assert cost.money is None

    def test_the_nearest_work_is_taken_and_named(self, cache):
        other = some_work(
            cache, encoder={"name": "clip", "weights_sha256": "cc" * 32, "layers": [1, 2]}
        )
        farther = some_work(
            cache, encoder={"name": "other"}, sampling={"num_frames": 99, "size": 1}
        )
        cache.commit([encoded(other, 1, encode_s=0.25), encoded(farther, 1, encode_s=100.0)])
        work = some_work(cache)

        cost = estimate(make_plan(cache, work, [clip(5)]), work, None)

        (video,) = cost.streams
        assert video.encode_s is not None
        assert (video.encode_s.mean, video.encode_s.differs) == (0.25, ("encoder.weights_sha256",))
        assert video.entry_bytes is None  # a size is not guessed from another encoder
        assert any("differs in encoder.weights_sha256" in note for note in cost.notes)

    def test_a_cpu_rate_says_nothing_of_a_gpu(self, cache):
        cache.commit([encoded(some_work(cache), 1)])
        work = some_work(cache, device="cuda", config=PipelineConfig(encode_gpus=1))
        cost = estimate(make_plan(cache, work, [clip(5)]), work, PRICES)
        assert cost.gpu_s is None
        assert any("only on cpu" in note for note in cost.notes)

    def test_gpu_seconds_are_those_that_the_encoder_holds(self, cache):
        work = some_work(
            cache, device="cuda", config=PipelineConfig(encode_gpus=0.5, encode_cpus=2)
        )
        cache.commit([encoded(work, 1, device="cuda")])
        cost = estimate(make_plan(cache, work, [clip(5), clip(6)]), work, PRICES)
        assert cost.gpu_s == pytest.approx(2 * 0.5 * 0.5)
        assert cost.cpu_s == pytest.approx(2 * (2.0 + 0.5 * 2))

    def test_decoding_once_for_windows_and_features_is_not_counted_twice(self, cache):
        work = some_work(cache)
        window = {"window": np.zeros((2, 3), np.uint8)}
        kept = new_entry(work.decoded_key("video", media(1)), window, decode_s=2.0)
        cache.commit([encoded(work, 1, decode_s=2.0), encoded(work, 2, decode_s=0.0), kept])
        cost = estimate(make_plan(cache, work, [clip(5)]), work, None)
        (video,) = cost.streams
        assert video.decode_s is not None
        assert video.decode_s.mean == 2.0
