"""AV-Shapes on disk: real H.264 and AAC, the right second in the right place, restartable, the same bytes again."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from crab.samples import read_samples
from crab.synth import make_scene, render_frame, render_mono, synthesise, targets

SEED, CLIPS, SIZE = 11, 5, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    synthesise(path, CLIPS, SEED, workers=2, size=SIZE)
    return path


def clips(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "clips").iterdir())}


def test_samples_name_clips_that_exist(folder: Path) -> None:
    samples = read_samples(folder / "samples.jsonl")
    assert len({sample.clip for sample in samples}) == CLIPS
    for url in {url for sample in samples for url, _ in sample.media()}:
        assert Path(url).is_file()
    record = json.loads((folder / "dataset.json").read_text())
    assert record["seed"] == SEED
    assert len(record["vocabularies"]["classes"]) == 12
    assert len(clips(folder)) == CLIPS


def test_clips_hold_what_the_scene_says(folder: Path) -> None:
    for index in range(CLIPS):
        scene = make_scene(SEED, index)
        with av.open(str(folder / "clips" / f"{scene.clip}.mp4")) as container:
            video = container.streams.video[0]
            assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert container.streams.audio[0].codec_context.name == "aac"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
            assert video.average_rate == 25
        assert len(frames) == 250
        # The first and the last frame of each second: a shift of one frame would blur an appearance.
        for second in range(10):
            for number in (25 * second, 25 * second + 24):
                difference = np.abs(
                    frames[number].astype(int) - render_frame(scene, number / 25, SIZE)
                )
                assert difference.mean() < 3
                assert (difference.max(axis=2) > 120).mean() < 0.005


def test_the_sound_is_in_its_second(folder: Path) -> None:
    for index in range(CLIPS):
        scene = make_scene(SEED, index)
        with av.open(str(folder / "clips" / f"{scene.clip}.mp4")) as container:
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
            decoded = container.decode(container.streams.audio[0])
            parts = [out.to_ndarray()[0] for frame in decoded for out in resampler.resample(frame)]
            parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
        sound = np.concatenate(parts)[:160_000]
        assert len(sound) == 160_000
        loudness = np.sqrt((sound.reshape(10, -1) ** 2).mean(axis=1))
        want = np.sqrt((render_mono(scene).reshape(10, -1) ** 2).mean(axis=1))
        sounding = targets(scene)[1].any(axis=1)
        np.testing.assert_allclose(loudness[sounding], want[sounding], rtol=0.1)
        assert (loudness[~sounding] < 0.001).all()


def test_another_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, CLIPS, SEED, workers=1, size=SIZE)
    assert clips(tmp_path) == clips(folder)
    assert (tmp_path / "samples.jsonl").read_bytes() == (folder / "samples.jsonl").read_bytes()


def test_a_second_call_makes_only_what_is_missing(tmp_path: Path) -> None:
    synthesise(tmp_path, 2, SEED, workers=1, size=SIZE)
    before = clips(tmp_path)
    lost, kept = sorted((tmp_path / "clips").iterdir())
    lost.unlink()
    (tmp_path / "clips" / f".{lost.name}.999999999.tmp").write_bytes(
        b"half a clip of a process that is gone"
    )
    stamp = kept.stat().st_mtime_ns
    synthesise(tmp_path, 3, SEED, workers=1, size=SIZE)
    after = clips(tmp_path)
    assert kept.stat().st_mtime_ns == stamp
    assert {name: after[name] for name in before} == before
    assert len(after) == 3


def test_a_folder_of_other_settings_is_not_mixed(folder: Path) -> None:
    before = clips(folder)
    with pytest.raises(ValueError, match=r"seed=11 but 12 is asked.*choose another folder"):
        synthesise(folder, CLIPS, 12, size=SIZE)
    with pytest.raises(ValueError, match="size"):
        synthesise(folder, CLIPS, SEED, size=SIZE + 2)
    assert clips(folder) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"num_clips": 0}, "num_clips 0"), ({"num_clips": 1, "size": 97}, "97")],
)
def test_numbers_out_of_range_are_refused(
    tmp_path: Path, arguments: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        synthesise(tmp_path, seed=0, **arguments)
    assert not list(tmp_path.iterdir())
