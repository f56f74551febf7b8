"""Bytes, errors and speed of every stored type and codec, on features of real clips.

    python benchmarks/feature_dtypes.py [--media DIR] [--synth 8] [--repeats 7]

Clips of DIR (default: `media` in the shared folder beside the repository, or in CRAB_SHARED) and of
AV-Shapes, made here, go through the decoder and the tiny encoders. What is measured is the cache's
own path: `write` converts, compresses, hashes and lays out a pack of one clip; `read` checks the
digest and gives arrays. MB/s count float32 (decoded windows: their own bytes), so that rows compare.

*L2* is the relative L2 error against the encoder's float32, *cos* the mean and the worst token's
cosine. *pays below*: compressed reads are faster than raw ones of the same type where the store
gives less than so many MB/s to one core. Ways take turns in every repeat. A codec whose arrays are
not bit-equal to the raw ones prints no figures and exits 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crab.encoders.frozen import VisionEncoder
from crab.encoders.load import load_encoder
from crab.media import DecodeRequest, decode_request
from crab.sampling import AudioSampling, VideoSampling
from crab.synth.dataset import synthesise
from crab_platform.identity import CODECS, DTYPES, RAW, AnyKey, DecodedKey, FeatureKey
from crab_platform.packs import Entry, build_pack, new_entry, open_entry, relative_l2
from jobs.presets import encoder_configs
from jobs.spec import Encoders

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

MEDIA = {".mp4", ".mkv", ".mov"}


@dataclass(kw_only=True)
class Way:
    """One stored type and codec, and what was seen of it."""

    dtype: str
    codec: str
    stored_bytes: int = 0
    write_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    found: list[Arrays] = field(default_factory=list)

    def key(self, stream: str) -> AnyKey:
        """A key of this type and codec; which clip it is of makes no difference here."""
        common: dict[str, Any] = {
            "media_sha256": "00" * 32,
            "stream": stream,
            "sampling": {},
            "decode": {},
            "codec": self.codec,
        }
        if self.dtype == "as decoded":
            return DecodedKey(**common)
        return FeatureKey(encoder={}, dtype=self.dtype, **common)


def clips(media: Path | None, synth: int, scratch: Path) -> Iterator[tuple[str, list[Path]]]:
    """Name of a set of clips and its files."""
    if media is not None and media.is_dir():
        yield "real clips", sorted(path for path in media.rglob("*") if path.suffix in MEDIA)
    if synth:
        synthesise(scratch, synth, seed=1)
        yield "AV-Shapes", sorted((scratch / "clips").glob("*.mp4"))


def decode_and_encode(
    paths: list[Path],
) -> tuple[list[tuple[str, Arrays]], list[tuple[str, Arrays]]]:
    """(decoded windows, features), each as (stream, arrays) a clip; what cannot be decoded is left out."""
    video, audio = encoder_configs(Encoders())
    vision, hearing = load_encoder(video), load_encoder(audio)
    assert isinstance(vision, VisionEncoder)
    windows: list[tuple[str, Arrays]] = []
    features: list[tuple[str, Arrays]] = []
    for path in paths:
        request = DecodeRequest(
            source=str(path),
            video=VideoSampling(num_frames=10, size=vision.image_size),
            audio=AudioSampling(num_segments=10, segment_ms=1000, stride_ms=1000, offset_ms=0),
        )
        decoded = decode_request(request)
        if isinstance(decoded.video, np.ndarray):
            windows.append(("video", {"frames": decoded.video}))
            features.append(("video", vision.encode(decoded.video)))
        if isinstance(decoded.audio, np.ndarray):
            windows.append(("audio", {"sound": decoded.audio}))
            features.append(("audio", hearing.encode(decoded.audio)))
    return windows, features


def measure(ways: list[Way], clips: list[tuple[str, Arrays]], repeats: int) -> None:
    """Fill the ways in, each in its turn within every repeat."""
    for repeat in range(repeats + 1):  # the first warms up
        for way in ways:
            packs: list[tuple[Entry, bytes]] = []
            started = time.perf_counter()
            for stream, arrays in clips:
                data, (entry,) = build_pack("packs/x", [new_entry(way.key(stream), arrays)])
                packs.append((entry, data))
            way.write_s.append(time.perf_counter() - started)
            entries = [(e, bytearray(data[e.offset : e.offset + e.length])) for e, data in packs]
            way.stored_bytes = sum(entry.length for entry, _ in entries)
            started = time.perf_counter()
            found = [open_entry(entry, data) for entry, data in entries]
            way.read_s.append(time.perf_counter() - started)
            if repeat == 0:
                way.found = found
                way.write_s.clear()
                way.read_s.clear()


def cosines(one: list[Arrays], other: list[Arrays]) -> tuple[float, float]:
    """(mean, lowest) cosine of a token with itself."""
    all_of_them = []
    for left, right in zip(one, other, strict=True):
        for name, array in left.items():
            a, b = array.astype(np.float64), right[name].astype(np.float64)
            product = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosine = np.sum(a * b, axis=-1) / np.maximum(product, 1e-300)
            both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)  # silence, a black line
            all_of_them.append(np.where(both_zero, 1.0, cosine).reshape(-1))
    values = np.concatenate(all_of_them)
    return float(values.mean()), float(values.min())


def pooled_l2(one: list[Arrays], other: list[Arrays]) -> float:
    """Relative L2 error over all clips together."""
    flat = [
        {"all": np.concatenate([a.reshape(-1) for arrays in side for a in arrays.values()])}
        for side in (one, other)
    ]
    return relative_l2(*flat)


def equal(one: list[Arrays], other: list[Arrays]) -> bool:
    return all(
        left.keys() == right.keys()
        and all(left[name].tobytes() == right[name].tobytes() for name in left)
        for left, right in zip(one, other, strict=True)
    )


def report(ways: list[Way], truth: list[Arrays]) -> bool:
    """Print one line a way; False when a codec changed values."""
    size = sum(array.nbytes for arrays in truth for array in arrays.values())
    print(
        f"  {'type':10} {'codec':21} {'MB':>7} {'ratio':>6} {'saves':>6} {'L2':>8} {'cos mean':>10} "
        f"{'cos worst':>10} {'write MB/s':>14} {'read MB/s':>14} {'pays below':>10}"
    )
    for way in ways:
        raw = next(w for w in ways if w.dtype == way.dtype and w.codec == RAW)
        if not equal(raw.found, way.found):
            print(f"  {way.dtype} {way.codec}: arrays differ from the raw ones; no figures")
            return False
        mean, worst = cosines(truth, way.found)
        write, read = (
            f"{size / 1e6 / min(times):.0f} ({size / 1e6 / statistics.median(times):.0f})"
            for times in (way.write_s, way.read_s)
        )
        saved, longer = raw.stored_bytes - way.stored_bytes, min(way.read_s) - min(raw.read_s)
        pays = f"{saved / 1e6 / longer:.0f}" if way is not raw and longer > 0 else "-"
        print(
            f"  {way.dtype:10} {way.codec:21} {way.stored_bytes / 1e6:7.2f} "
            f"{size / way.stored_bytes:6.2f} {saved / raw.stored_bytes:6.1%} "
            f"{pooled_l2(truth, way.found):8.1e} {mean:10.7f} {worst:10.7f} {write:>14} {read:>14} "
            f"{pays:>10}"
        )
    return True


def main() -> int:
    shared = Path(os.environ.get("CRAB_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--media", type=Path, default=shared / "media")
    parser.add_argument("--synth", type=int, default=8, help="AV-Shapes clips; 0 for none")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("blosc2", "numpy", "blake3"))
    print(f"{libraries}; {platform.machine()}, 1 thread, load {os.getloadavg()[0]:.1f}", end="; ")
    print(f"MB/s: best (median) of {args.repeats} repeats")
    with tempfile.TemporaryDirectory() as scratch:
        for name, paths in clips(args.media, args.synth, Path(scratch)):
            windows, features = decode_and_encode(paths)
            for stream in ("video", "audio"):
                for level, found in (("features", features), ("decoded windows", windows)):
                    chosen = [(s, arrays) for s, arrays in found if s == stream]
                    dtypes = DTYPES if level == "features" else ("as decoded",)
                    ways = [Way(dtype=dtype, codec=codec) for dtype in dtypes for codec in CODECS]
                    measure(ways, chosen, args.repeats)
                    tokens = sum(a.size // a.shape[-1] for _, x in chosen for a in x.values())
                    print(f"\n{name}, {stream}, {level}: {len(chosen)} clips, {tokens} rows")
                    if not report(ways, [arrays for _, arrays in chosen]):
                        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
