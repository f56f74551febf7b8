"""AV-Shapes on disk: real H.264 and AAC, the right second in the right place, restartable, the same bytes again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from crab.masks import read_class_map, read_mask
from crab.samples import Sample, read_samples
from crab.synth import (
    CLASS_NUMBERS,
    make_scene,
    render_frame,
    render_mono,
    shape_mask,
    synthesise,
    targets,
)
from crab.tasks import TASKS, Answer, Masks

SEED, CLIPS, SIZE = 11, 5, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    synthesise(path, CLIPS, SEED, workers=2, size=SIZE)
    return path


def clips(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "clips").iterdir())}


def maps(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "masks").glob("**/*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def test_samples_name_clips_that_exist(folder: Path) -> None:
    samples = read_samples(folder / "samples.jsonl")
    assert len({sample.clip for sample in samples}) == CLIPS
    for url in {url for sample in samples for url, _ in sample.media()}:
        assert Path(url).is_file()
    record = json.loads((folder / "dataset.json").read_text())
    assert record["seed"] == SEED
    assert len(record["vocabularies"]["classes"]) == 12
    assert len(clips(folder)) == CLIPS
    masks = {mask.file for sample in samples for mask in sample.masks}
    assert masks == {str(folder / name) for name in maps(folder)}
    assert len(masks) == 10 * CLIPS


def test_mask_files_hold_the_shapes_to_the_pixel(folder: Path) -> None:
    scenes = {scene.clip: scene for scene in (make_scene(SEED, index) for index in range(CLIPS))}
    for name, data in maps(folder).items():
        assert len(data) < 1000, name
    masked = [sample for sample in read_samples(folder / "samples.jsonl") if sample.masks]
    assert {sample.task for sample in masked} >= {"s4", "avss", "ref-avs"}
    for sample in masked:
        scene = scenes[sample.clip]
        for ref in sample.masks:
            want = np.zeros((224, 224), dtype=np.uint8)
            for actor in scene.actors:
                if CLASS_NUMBERS[actor.name] in (ref.values or ()):
                    shape = shape_mask(scene, actor, ref.frame)
                    want[shape] = CLASS_NUMBERS[actor.name]
            np.testing.assert_array_equal(read_class_map(ref), want)
            np.testing.assert_array_equal(read_mask(ref), want > 0)


def test_true_masks_score_as_high_as_can_be(folder: Path) -> None:
    samples = read_samples(folder / "samples.jsonl")
    for name in {sample.task for sample in samples if sample.masks}:
        task = TASKS[name]
        some = [sample for sample in samples if sample.task == name]
        scores = task.score(some, [true_answer(sample) for sample in some])
        best = scores["miou_attainable"] if name == "avss" else task.perfect
        assert scores[task.headline] == pytest.approx(best)
        assert scores["parse_rate"] == 1


def true_answer(sample: Sample) -> Answer:
    task = TASKS[sample.task]
    frames = tuple(ref.frame for ref in sample.masks)
    if task.needs == "classes":
        masks = Masks(frames=frames, values=np.stack([read_class_map(ref) for ref in sample.masks]))
    else:
        truth = np.stack([read_mask(ref) for ref in sample.masks])
        masks = Masks(frames=frames, values=truth.astype(np.float32))
    return Answer(text=task.target(sample), masks=masks)


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
    assert maps(tmp_path) == maps(folder)
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


def test_masks_that_are_missing_are_made_without_the_clip(tmp_path: Path) -> None:
    synthesise(tmp_path, 1, SEED, workers=1, size=SIZE)
    before = maps(tmp_path)
    [clip] = (tmp_path / "clips").iterdir()
    [kept] = (tmp_path / "masks").iterdir()
    stamp = clip.stat().st_mtime_ns
    half = tmp_path / "masks" / f".{kept.name}.999999999.tmp"
    kept.rename(half)
    (half / "9.png").unlink()
    synthesise(tmp_path, 1, SEED, workers=1, size=SIZE)
    assert maps(tmp_path) == before
    assert clip.stat().st_mtime_ns == stamp
    assert not half.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="leftovers are told by /proc")
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    code = f"from crab.synth import synthesise; synthesise({str(tmp_path)!r}, {CLIPS}, {SEED}, workers=1, size={SIZE})"
    killed = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 120
    # Once one clip is there, the next one is under way.
    while not list((tmp_path / "clips").glob("shapes-*.mp4")):
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no clip after two minutes"
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "samples.jsonl").exists()
    for path in (tmp_path / "masks").glob("shapes-*"):
        assert len(list(path.iterdir())) == 10
    synthesise(tmp_path, CLIPS, SEED, workers=1, size=SIZE)
    assert clips(tmp_path) == clips(folder)
    assert maps(tmp_path) == maps(folder)
    assert not list(tmp_path.glob("*/.*"))


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
