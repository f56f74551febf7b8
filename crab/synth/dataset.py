"""A folder of AV-Shapes: clips/*.mp4, masks/*/0.png ... 9.png, samples.jsonl, dataset.json.

`dataset.json` is written first and says what the folder holds; a second call with other settings is refused instead of
mixing clips. A clip or a folder of masks that exists is complete (it got its name by a rename) and is not written
again, so a run that was killed goes on where it stopped, and one that is finished costs nothing. `samples.jsonl` is
written last.
"""

import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crab.samples import write_samples
from crab.synth.index_maps import map_folder, write_maps
from crab.synth.make import SCENE_VERSION, make_scene
from crab.synth.questions import QUESTIONS_PER_CLIP, samples_of
from crab.synth.sample import video_path
from crab.synth.scene import CLASS_NAMES, COLUMNS
from crab.synth.words import NUMBERS
from crab.synth.write import AUDIO_RATE_HZ, FPS, write_clip


def synthesise(
    out_dir: str | Path,
    num_clips: int,
    seed: int = 0,
    workers: int | None = None,
    *,
    size: int = 224,
    questions_per_clip: int = QUESTIONS_PER_CLIP,
) -> Path:
    """Make the clips that are not there yet and write the samples; returns the path of samples.jsonl.

    `workers` processes encode (default: one a core; 1 stays in this process). `size` is the side of the picture in
    pixels. Clip i is the same whatever `num_clips` is, so a folder can be grown. ValueError where the folder holds
    clips of other settings, or for numbers out of range.
    """
    if num_clips < 1:
        raise ValueError(f"num_clips {num_clips} given, expected 1 or more")
    if size < 32 or size % 2:
        raise ValueError(
            f"size {size} given, expected an even number of pixels, 32 or more (H.264 in 4:2:0)"
        )
    folder = Path(out_dir)
    for name in ("clips", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _claim(
        folder,
        {
            "scene_version": SCENE_VERSION,
            "seed": seed,
            "size": size,
            "fps": FPS,
            "audio_rate_hz": AUDIO_RATE_HZ,
        },
    )
    _sweep(folder / "clips")
    _sweep(folder / "masks")
    scenes = [make_scene(seed, index) for index in range(num_clips)]
    missing = [
        scene.index
        for scene in scenes
        if not all((folder / path(scene)).exists() for path in (video_path, map_folder))
    ]
    _write_clips(folder, seed, missing, size, workers or len(os.sched_getaffinity(0)))
    samples = [sample for scene in scenes for sample in samples_of(scene, questions_per_clip)]
    return write_samples(folder / "samples.jsonl", samples)


def _write_clips(folder: Path, seed: int, indices: list[int], size: int, workers: int) -> None:
    write = partial(_write_one, folder, seed, size)
    # disable=None: no bar unless standard error is a terminal.
    bar = partial(tqdm, total=len(indices), unit="clip", desc="AV-Shapes", disable=None)
    if workers == 1 or len(indices) < 2:
        for index in bar(indices):
            write(index)
        return
    # Not fork: callers have torch and Ray loaded, and a forked child inherits their locked locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(indices)), mp_context=context) as pool:
        for _ in bar(pool.map(write, indices, chunksize=4)):
            pass


def _write_one(folder: Path, seed: int, size: int, index: int) -> None:
    scene = make_scene(seed, index)
    if not (masks := folder / map_folder(scene)).exists():
        write_maps(scene, masks)
    if not (clip := folder / video_path(scene)).exists():
        write_clip(scene, clip, size)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write dataset.json, or check that the one that is there has the same settings."""
    record = folder / "dataset.json"
    if record.exists():
        held = json.loads(record.read_text())
        differ = {
            key: (held.get(key), value) for key, value in settings.items() if held.get(key) != value
        }
        if differ:
            words = ", ".join(
                f"{key}={old!r} but {new!r} is asked" for key, (old, new) in differ.items()
            )
            raise ValueError(
                f"{folder} holds AV-Shapes with {words}; choose another folder or delete this one"
            )
        return
    vocabularies = {
        "classes": CLASS_NAMES,
        "positions": COLUMNS,
        "numbers": NUMBERS,
        "yes_no": ("yes", "no"),
    }
    temporary = record.with_name(f".{record.name}.{os.getpid()}.tmp")
    temporary.write_text(
        json.dumps({"name": "AV-Shapes", **settings, "vocabularies": vocabularies}, indent=2) + "\n"
    )
    temporary.replace(record)


def _sweep(folder: Path) -> None:
    """Delete what processes that are gone have left half written: clips, or folders of masks."""
    for leftover in folder.glob(".*.tmp"):
        owner = re.fullmatch(r"\..*\.(\d+)\.tmp", leftover.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
