"""Random pairs of settings (A8): where features differ their keys differ, and equal keys mean equal bits.

Everything is the product's own: a spec becomes a job, the job decodes real small clips, encodes them with tiny
encoders and rounds the features as they are stored. What a pair may differ in is drawn from all that a spec can say.
A key function that forgets a field is planted afterwards on the very same outcomes, and must be found.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from support.fields import Path as Field
from support.fields import another, without
from support.media_files import counting_clip, flat, tone, write_clip
from support.tiny_encoders import hearing_folder, vision_folder
from transformers import CLIPVisionConfig, CLIPVisionModel

from crab.encoders.beats import BeatsConfig
from crab.encoders.config import TINY_SELECT_LAYERS, EncoderConfig
from crab.encoders.load import load_encoder
from crab.media import DecodeRequest, decode_request
from crab_platform.identity import digest, sha256_file
from crab_platform.packs import new_entry
from jobs.preprocess import build_work
from jobs.presets import TINY
from jobs.spec import PreprocessSpec, parse_spec

QUICK_PAIRS = 40
FULL_PAIRS = 300

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class World:
    """Two clips, a few encoders, and all values that a setting may have."""

    clips: tuple[Path, ...]
    identity: Mapping[str, Sequence[Any]]
    execution: Mapping[str, Sequence[Any]]

    def draw(self, rng: random.Random) -> Settings:
        return {
            name: rng.choice(values) for name, values in (self.identity | self.execution).items()
        }

    def pair(self, rng: random.Random) -> tuple[Settings, Settings]:
        """Two settings of which few fields differ: in what is identity, or only in what is not."""
        one = self.draw(rng)
        pool = rng.choice([self.identity, self.identity, self.execution])
        changed = rng.sample(sorted(pool), rng.choice([1, 1, 2, 3]))
        return one, one | {name: rng.choice(pool[name]) for name in changed}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The features of one stream: the record of their key, and a digest of their bits."""

    record: Mapping[str, Any]
    bits: str
    settings: Settings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    moving = [flat(10 * k) + np.arange(64, dtype=np.uint8)[None, :, None] for k in range(12)]
    clips = (
        counting_clip(folder / "counting.mkv", 2, samples=tone([440.0, 880.0])),
        write_clip(
            folder / "moving.mkv",
            pictures=moving,
            times_ms=[100 * k for k in range(12)],
            samples=tone([600.0, 300.0]),
        ),
    )
    seeing = {
        "base": vision_folder(folder / "v-base"),
        "seed": vision_folder(folder / "v-seed", seed=1),
        "size": vision_folder(folder / "v-size", size=48),
        "act": vision_folder(folder / "v-act", act="gelu"),
        "mean": vision_folder(folder / "v-mean", mean=0.4),
        "copy": Path(shutil.copytree(folder / "v-base", folder / "v-copy")),
    }
    hearing = {
        "base": hearing_folder(folder / "a-base"),
        "seed": hearing_folder(folder / "a-seed", seed=1),
        "deep": hearing_folder(folder / "a-deep", layers=2),
        "far": hearing_folder(folder / "a-far", max_distance=64),
    }
    identity = {
        "clip": range(len(clips)),
        "num_frames": [1, 2, 3, 4],
        "num_segments": [1, 2, 3],
        "segment_ms": [200, 250, 400],
        "stride_ms": [100, 300, 500],
        "offset_ms": [-100, 0, 30, 250],
        "tasks": [{}, {"avqa": "music-avqa"}],
        "store_as": ["float16", "bfloat16", "float32", "int8"],
        "codec": ["raw", "blosc2-shuffle-zstd1"],
        "seeing": [str(path) for path in seeing.values()],
        "layers": [[1], [2], [-1], [0, 2], [1, 2]],
        "seeing_dtype": ["float32", "bfloat16"],
        "hearing": [str(path) for path in hearing.values()],
        "hearing_dtype": ["float32", "bfloat16"],
    }
    execution = {
        "name": ["one", "other"],
        "cache": ["cache", "other-cache"],
        "device": ["auto", "cpu"],
        "decode_processes": [1, 2],
        "copied": [False, True],
    }
    return World(clips=clips, identity=identity, execution=execution)


def spec_of(settings: Settings) -> PreprocessSpec:
    spec = parse_spec(
        {
            "job": "preprocess",
            "name": settings["name"],
            "data": [{"name": "clips", "files": "clips"}],
            "cache": settings["cache"],
            "sampling": {
                name: settings[name]
                for name in (
                    "num_frames",
                    "num_segments",
                    "segment_ms",
                    "stride_ms",
                    "offset_ms",
                    "tasks",
                )
            },
            "encoders": {
                "video": {
                    "kind": "clip",
                    "path": settings["seeing"],
                    "select_layers": settings["layers"],
                    "dtype": settings["seeing_dtype"],
                    "device": settings["device"],
                    "batch_size": settings.get("batch_size", 32),
                },
                "audio": {
                    "kind": "beats",
                    "path": settings["hearing"],
                    "dtype": settings["hearing_dtype"],
                    "device": settings["device"],
                    "batch_size": settings.get("batch_size", 32),
                },
                "store_as": settings["store_as"],
                "codec": settings["codec"],
            },
            "pipeline": {"decode_processes": settings["decode_processes"]},
        }
    )
    assert isinstance(spec, PreprocessSpec)
    return spec


def outcomes_of(world: World, settings: Settings, folder: Path) -> list[Outcome]:
    """Keys and features of every stream of one clip."""
    clip = world.clips[settings["clip"]]
    if settings["copied"]:
        clip = Path(shutil.copy(clip, folder / f"copy-{secrets.token_hex(4)}{clip.suffix}"))
    with clip.open("rb") as file:
        sha256 = sha256_file(file)
    work = build_work(spec_of(settings))
    found = []
    for name, stream in work.streams.items():
        key = work.key(name, sha256)
        kind = "audio" if stream.stream == "audio" else "video"
        request = DecodeRequest(source=str(clip), **{kind: stream.request})
        array = getattr(decode_request(request), kind)
        assert isinstance(array, np.ndarray), array
        entry = new_entry(key, stream.make_encoder()(array))
        found.append(Outcome(record=key.record(), bits=bits_of(entry.arrays), settings=settings))
    return found


def bits_of(arrays: Mapping[str, np.ndarray]) -> str:
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        hasher.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        hasher.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hasher.hexdigest()


def outcomes(world: World, seed: int, pairs: int, folder: Path) -> list[Outcome]:
    rng = random.Random(seed)
    return [
        outcome
        for _ in range(pairs)
        for settings in world.pair(rng)
        for outcome in outcomes_of(world, settings, folder)
    ]


def stale(found: Sequence[Outcome], leave_out: Field = ()) -> list[str]:
    """Outcomes that one key would have given another one's features for. `leave_out`: a key without this field.

    All pairs are compared, those that were drawn and those that just came about.
    """
    by_key: dict[str, Outcome] = {}
    problems = []
    for outcome in found:
        record = outcome.record
        key = digest(_without(record, leave_out) if leave_out else dict(record))
        first = by_key.setdefault(key, outcome)
        if first.bits != outcome.bits:
            problems.append(f"one key, two features:\n  {first.settings}\n  {outcome.settings}")
    return problems


def _without(record: Mapping[str, Any], path: Field) -> dict[str, Any]:
    try:
        return without(record, path)
    except KeyError:  # streams of another kind have no such field
        return dict(record)


@pytest.fixture(scope="module")
def quick(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return outcomes(world, seed=1, pairs=QUICK_PAIRS, folder=tmp_path_factory.mktemp("quick"))


def test_features_that_differ_have_keys_that_differ(quick: list[Outcome]) -> None:
    assert stale(quick) == []
    # It was not empty: many features, and the same ones met again by another way.
    keys = {digest(dict(outcome.record)) for outcome in quick}
    assert len({outcome.bits for outcome in quick}) > QUICK_PAIRS
    assert len(keys) < len(quick)


PLANTED = (
    "encoder.layers",
    "encoder.weights_sha256",
    "encoder.image_mean",
    "encoder.architecture",
    "encoder.compute_dtype",
    "sampling.num_frames",
    "sampling.num_segments",
    "sampling.stride_ms",
    "sampling.offset_ms",
    "sampling",
    "encoder",
    "dtype",
    "media_sha256",
)


@pytest.mark.parametrize("field", PLANTED)
def test_a_key_without_a_field_that_matters_is_found(
    field: str, world: World, quick: list[Outcome], tmp_path: Path
) -> None:
    found = list(quick)
    rng = random.Random(field)
    # Forty pairs need not change every field alone: go on, as a full run would.
    for _ in range(FULL_PAIRS):
        if stale(found, tuple(field.split("."))):
            return
        found += [o for settings in world.pair(rng) for o in outcomes_of(world, settings, tmp_path)]
    raise AssertionError(f"a key without {field} was not found with {len(found)} outcomes")


@pytest.mark.faults
def test_features_that_differ_have_keys_that_differ_in_300_pairs(
    world: World, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CRAB_FAULT_SEED") or secrets.randbelow(1 << 32))
    print(f"CRAB_FAULT_SEED={seed}")
    found = outcomes(world, seed, FULL_PAIRS, tmp_path)
    assert stale(found) == []
    for field in PLANTED:
        assert stale(found, tuple(field.split("."))), f"a key without {field} was not found"


# The files beside the weights.

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
SOUND = np.random.default_rng(1).uniform(-1, 1, (2, 4000)).astype(np.float32)


def settings_of_files() -> list[tuple[str, str, str]]:
    """(encoder, file, field) of all that an encoder's JSON files can say, written there or left to a default."""
    statistics = ("image_mean", "image_std", "rescale_factor", "do_normalize", "size", "crop_size")
    statistics += ("do_rescale", "do_resize", "do_center_crop", "resample", "do_convert_rgb")
    return [
        *(("clip", "config.json", name) for name in CLIPVisionConfig().to_dict()),
        *(("clip", "preprocessor_config.json", name) for name in statistics),
        *(("beats", "config.json", name) for name in BeatsConfig.model_fields),
    ]


@pytest.mark.parametrize(("kind", "file", "name"), settings_of_files())
def test_a_setting_in_an_encoders_files_is_in_its_record_or_changes_nothing(
    kind: str, file: str, name: str, tmp_path: Path
) -> None:
    folder = (vision_folder if kind == "clip" else hearing_folder)(tmp_path / "encoder")
    layers = (1, 2) if kind == "clip" else ()
    config = EncoderConfig.model_validate(
        {"kind": kind, "path": str(folder), "select_layers": layers}
    )
    items = FRAMES if kind == "clip" else SOUND
    encoder = load_encoder(config)
    before, bits = encoder.record(), bits_of(encoder.encode(items))

    written = json.loads((folder / file).read_text())
    written[name] = other_setting(name, written.get(name))
    (folder / file).write_text(json.dumps(written))
    try:
        changed = load_encoder(config)
        new_bits = bits_of(changed.encode(items))
    except Exception as error:  # refused: no features, so none that could be taken for others
        print(f"{name}={written[name]!r} refused: {type(error).__name__}: {str(error)[:100]}")
        return
    assert new_bits == bits or changed.record() != before


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers puts an adapter that lies beside a tower into it, by a scale that stands in no tensor."""
    folder = vision_folder(tmp_path / "encoder")
    tower = CLIPVisionModel.from_pretrained(folder)
    get_peft_model(tower, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    config = EncoderConfig(kind="clip", path=str(folder), select_layers=(1, 2))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_encoder(config)


@pytest.mark.parametrize("kind", ["clip", "beats"])
def test_the_size_of_a_batch_changes_no_more_than_rounding(kind: str) -> None:
    """It is in no key. On the CPUs that we tried the bits are the same; that much is not promised for others."""
    layers = TINY_SELECT_LAYERS if kind == "clip" else ()
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 256, (10, 112, 112, 3), dtype=np.uint8)
    items = frames if kind == "clip" else rng.uniform(-1, 1, (10, 16_000)).astype(np.float32)
    values = {"kind": kind, "path": str(TINY / kind), "select_layers": layers}
    found = [
        load_encoder(EncoderConfig.model_validate(values | {"batch_size": size})).encode(items)
        for size in (32, 7, 1)
    ]
    for other in found[1:]:
        for name, array in found[0].items():
            error = np.linalg.norm(other[name] - array) / np.linalg.norm(array)
            assert error < 1e-5


def other_setting(name: str, value: Any) -> Any:
    given = {
        "hidden_act": "gelu",
        "model_type": "siglip_vision_model",
        "dtype": "bfloat16",
        "num_attention_heads": 4,
        "encoder_attention_heads": 4,
    }
    if name in given:
        return given[name]
    return 1 if value is None else another(value) if value not in ({}, []) else value
