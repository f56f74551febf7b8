"""A cache of 100 million clips on S3, on paper: objects, bytes, requests, minutes, money.

    python benchmarks/scale_paper.py [--clips N] [--profile P] [--write docs/scale.md]

Prints the table of docs/scale.md; `--write` puts it there. Every row says how it comes about, from
the constants below and the prices of the profile. Nothing is measured here and no store is asked.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crab_platform.cache import PACK_BYTES
from crab_platform.cost import (
    Prices,
    cache_pays,
    compute_cost,
    list_cost,
    load_profile,
    money,
    read_cost,
    store_cost,
)
from crab_platform.ranges import PIECE_BYTES
from crab_platform.snapshots import ROWS as SNAPSHOT_ROWS
from crab_platform.storage import IN_FLIGHT

CLIPS = 100_000_000
STREAMS = 2
START, END = "<!-- table: benchmarks/scale_paper.py -->", "<!-- end of table -->"

# What AWS says of S3; the addresses are in docs/scale.md.
GETS_PER_S = 5500
PUTS_PER_S = 3500  # DELETE counts as PUT
PAGE = 1000
ANSWER_S = 0.1  # first byte of a small object, and a page of LIST
STREAM_BYTES_PER_S = 85e6  # one request

# Ours.
PACK_PREFIXES = 256  # packs/<2 hex>/
SNAPSHOT_ROW_BYTES = 114  # measured 2026-11-23: 96,000 rows written by snapshots.write_snapshot
MANIFEST_ROW_BYTES = 88  # measured 2026-11-23: 128,000 rows of catalog, all of them ready
INDEX_BYTES_PER_KEY = (
    380  # measured 2026-11-23: resident memory of an index of 1,000,000 keys, 158 of them arrays
)
INDEX_KEYS_PER_S = 200_000  # docs/log.md, 2026-11-23: 100,000 keys in 0.5 s, one core

# Assumed.
FLEET_BYTES_PER_S = 10e9  # all machines of a job together; 80 Gbit/s
DEAD = 0.1  # share of the packs that one garbage collection removes


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What one clip of 10 frames and 10 seconds leaves behind, in float16."""

    name: str
    video: tuple[int, int, int, int]
    """(layers, frames, patches, width)."""
    audio: tuple[int, int, int]
    """(segments, tokens, width)."""
    commit_bytes: int
    """Measured 2026-11-23: the commit of one full pack."""
    decode_cpu_s: float
    encode_cpu_s: float
    encode_gpu_s: float

    @property
    def clip_bytes(self) -> int:
        """Both streams of a clip."""
        return 2 * math.prod(self.video) + 2 * math.prod(self.audio)

    @property
    def clips_per_pack(self) -> int:
        """Whole clips that fit."""
        return PACK_BYTES // self.clip_bytes


# Decode: 0.8 CPU-s for 10 s of 720p, from 2.27 CPU-s for 30 s (decord, GOP 30, 2 frames a second).
# Encode, paper: 162 GFLOP a frame and 9 a second of sound (2 x parameters x tokens, and attention),
# in float32 at 40 % of the 31 TFLOP/s of an A10G. Encode, tiny: 27 s for 200 clips, docs/log.md.
PAPER = Preset(
    name="paper",
    video=(3, 10, 256, 1024),
    audio=(10, 48, 768),
    commit_bytes=13_035,
    decode_cpu_s=0.8,
    encode_cpu_s=0.0,
    encode_gpu_s=0.14,
)
TINY = Preset(
    name="tiny",
    video=(2, 10, 196, 96),
    audio=(10, 48, 96),
    commit_bytes=103_650,
    decode_cpu_s=0.8,
    encode_cpu_s=0.135,
    encode_gpu_s=0.0,
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The counts that everything else follows from."""

    preset: Preset
    clips: int
    prices: Prices

    @property
    def bytes(self) -> int:
        return self.clips * self.preset.clip_bytes

    @property
    def packs(self) -> int:
        return math.ceil(self.clips / self.preset.clips_per_pack)

    @property
    def keys(self) -> int:
        return self.clips * STREAMS

    @property
    def pages(self) -> int:
        """LIST requests for the commits, or for the packs: there are as many of each."""
        return math.ceil(self.packs / PAGE)

    @property
    def snapshots(self) -> int:
        return math.ceil(self.keys / SNAPSHOT_ROWS)

    @property
    def pieces(self) -> int:
        """GETs that read one clip by itself."""
        return math.ceil(self.preset.clip_bytes / PIECE_BYTES)


def number(count: float) -> str:
    """A count with three digits: 412, 6.25 million."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if count >= unit:
            return f"{count / unit:.4g}{name}"
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:.2g}"


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whatever gives a number that one can picture."""
    for unit, name, least in ((86400, "days", 2), (3600, "h", 2), (60, "min", 2)):
        if seconds >= least * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s"


Row = tuple[str, str, Callable[[Scale], str]]


def _money(amount: Callable[[Scale], float]) -> Callable[[Scale], str]:
    return lambda scale: money(amount(scale), scale.prices.currency)


def _snapshot_s(scale: Scale) -> float:
    """Snapshots are read one after the other."""
    last = ANSWER_S + SNAPSHOT_ROWS * SNAPSHOT_ROW_BYTES / STREAM_BYTES_PER_S
    return scale.snapshots * last


def _memory(scale: Scale) -> str:
    return size(scale.keys * INDEX_BYTES_PER_KEY)


def _compute(scale: Scale) -> float:
    preset = scale.preset
    return scale.clips * compute_cost(
        preset.decode_cpu_s + preset.encode_cpu_s, preset.encode_gpu_s, scale.prices
    )


def _hours(scale: Scale, *, gpu: bool) -> str:
    preset = scale.preset
    seconds = preset.encode_gpu_s if gpu else preset.decode_cpu_s + preset.encode_cpu_s
    return number(round(scale.clips * seconds / 3600))


def _reuses(scale: Scale) -> str:
    preset = scale.preset
    reuses = cache_pays(
        bytes_=preset.clip_bytes,
        decode_cpu_s=preset.decode_cpu_s,
        encode_cpu_s=preset.encode_cpu_s,
        encode_gpu_s=preset.encode_gpu_s,
        prices=scale.prices,
    ).reuses
    return "never" if reuses is None else str(reuses)


def _dead(scale: Scale) -> int:
    """Files that one garbage collection deletes: packs and their commits."""
    return 2 * math.ceil(DEAD * scale.packs)


ROWS: list[Row] = [
    ("**Size**", "", lambda s: ""),
    ("features of a clip", "2 bytes x all shapes", lambda s: size(s.preset.clip_bytes)),
    ("features", "clips x that", lambda s: size(s.bytes)),
    ("clips in a pack", "256 MiB / clip, whole ones", lambda s: number(s.preset.clips_per_pack)),
    ("packs, and as many commits", "clips / clips in a pack", lambda s: number(s.packs)),
    (
        "all commits",
        "commits x size of one, measured",
        lambda s: size(s.packs * s.preset.commit_bytes),
    ),
    ("keys", "clips x 2 streams", lambda s: number(s.keys)),
    ("one manifest", f"keys x {MANIFEST_ROW_BYTES} B", lambda s: size(s.keys * MANIFEST_ROW_BYTES)),
    ("**Write once**", "", lambda s: ""),
    ("PUTs", "packs + commits", lambda s: number(2 * s.packs)),
    ("time at 10 GB/s", "features / 10 GB/s", lambda s: duration(s.bytes / FLEET_BYTES_PER_S)),
    (
        "PUTs a second meanwhile on `commits/`",
        f"packs / time; limit {PUTS_PER_S:,}",
        lambda s: number(s.packs / (s.bytes / FLEET_BYTES_PER_S)),
    ),
    ("the PUTs", "PUTs x price", _money(lambda s: store_cost(0, 0, 2 * s.packs, s.prices))),
    (
        "decode and encode: CPU-hours, GPU-hours",
        "clips x assumed seconds",
        lambda s: f"{_hours(s, gpu=False)}, {_hours(s, gpu=True)}",
    ),
    ("... money", "hours x prices", _money(_compute)),
    ("**Keep**", "", lambda s: ""),
    (
        "a month of the features",
        "GB x price",
        _money(lambda s: store_cost(s.bytes, 1, 0, s.prices)),
    ),
    ("cache pays from so many reuses a month", "`cost.cache_pays`", _reuses),
    ("**Load the index at the start of a job**", "", lambda s: ""),
    ("LIST pages", f"commits / {PAGE:,}", lambda s: number(s.pages)),
    ("... time, one after the other", "pages x 0.1 s", lambda s: duration(s.pages * ANSWER_S)),
    ("... money", "pages x price", _money(lambda s: list_cost(s.packs, s.prices))),
    (
        "without snapshots: GETs, time",
        f"commits x 0.1 s / {IN_FLIGHT} in flight",
        lambda s: f"{number(s.packs)}, {duration(s.packs * ANSWER_S / IN_FLIGHT)}",
    ),
    (
        "... time at the limit of one prefix",
        f"commits / {GETS_PER_S:,}",
        lambda s: duration(s.packs / GETS_PER_S),
    ),
    ("... money", "GETs x price", _money(lambda s: read_cost(0, s.packs, False, s.prices))),
    ("with snapshots: files", f"keys / {SNAPSHOT_ROWS:,}", lambda s: number(s.snapshots)),
    (
        "... size of one, of all",
        f"rows x {SNAPSHOT_ROW_BYTES} B",
        lambda s: (
            f"{size(min(SNAPSHOT_ROWS, s.keys) * SNAPSHOT_ROW_BYTES)}, "
            f"{size(s.keys * SNAPSHOT_ROW_BYTES)}"
        ),
    ),
    (
        "... time to read, one after the other",
        "files x (0.1 s + bytes / 85 MB/s)",
        lambda s: duration(_snapshot_s(s)),
    ),
    (
        "rows into an index",
        f"keys / {INDEX_KEYS_PER_S:,} a second",
        lambda s: duration(s.keys / INDEX_KEYS_PER_S),
    ),
    ("memory of the index", "keys x bytes a key, measured", _memory),
    ("**Read every clip once**", "", lambda s: ""),
    (
        "GETs in the order of packs",
        "packs x 256 MiB / 8 MiB",
        lambda s: number(s.packs * math.ceil(PACK_BYTES / PIECE_BYTES)),
    ),
    ("GETs at random", "clips x ceil(clip / 8 MiB)", lambda s: number(s.clips * s.pieces)),
    (
        "... money",
        "GETs x price",
        _money(lambda s: read_cost(0, s.clips * s.pieces, False, s.prices)),
    ),
    ("time at 10 GB/s", "features / 10 GB/s", lambda s: duration(s.bytes / FLEET_BYTES_PER_S)),
    (
        "GETs a second meanwhile, at random",
        f"limit {PACK_PREFIXES} x {GETS_PER_S:,} = {number(PACK_PREFIXES * GETS_PER_S)}",
        lambda s: number(s.pieces * FLEET_BYTES_PER_S / s.preset.clip_bytes),
    ),
    (
        "if it leaves the region",
        "GB x price",
        _money(lambda s: read_cost(s.bytes, 0, True, s.prices)),
    ),
    ("**Collect garbage, a tenth of it dead**", "", lambda s: ""),
    ("LIST pages", "those of packs and of commits", lambda s: number(2 * s.pages)),
    ("... time", "pages x 0.1 s", lambda s: duration(2 * s.pages * ANSWER_S)),
    ("DELETEs", "2 x packs / 10", lambda s: number(_dead(s))),
    ("... time, one after the other", "DELETEs x 0.1 s", lambda s: duration(_dead(s) * ANSWER_S)),
    (
        "... time, 32 in flight",
        "DELETEs x 0.1 s / 32",
        lambda s: duration(_dead(s) * ANSWER_S / IN_FLIGHT),
    ),
    (
        "money",
        "LIST; DELETE is free",
        _money(lambda s: 2 * list_cost(s.packs, s.prices)),
    ),
    (
        "saved a month",
        "a tenth of the storage",
        _money(lambda s: store_cost(DEAD * s.bytes, 1, 0, s.prices)),
    ),
]


def table(clips: int = CLIPS, profile: str = "aws-example") -> str:
    """The table as Markdown: both presets at `clips`, and the paper one at a hundredth of them."""
    prices = load_profile(profile).prices
    part = max(1, clips // 100)
    scales = [
        Scale(preset=PAPER, clips=clips, prices=prices),
        Scale(preset=TINY, clips=clips, prices=prices),
        Scale(preset=PAPER, clips=part, prices=prices),
    ]
    heads = [f"{scale.preset.name}, {number(scale.clips)} clips" for scale in scales]
    lines = [f"| | how | {' | '.join(heads)} |", "|---|---|---:|---:|---:|"]
    for what, how, value in ROWS:
        lines.append(f"| {what} | {how} | {' | '.join(value(scale) for scale in scales)} |")
    return "\n".join(lines)


def with_table(text: str, new: str) -> str:
    """A document with the table between its two marks replaced. Raises ValueError where they are absent."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"expected the marks {START} and {END}")
    return f"{before}{START}\n\n{new}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--profile", default="aws-example", help="name or path of a profile")
    parser.add_argument("--write", type=Path, help="a document whose table is to be replaced")
    given = parser.parse_args()
    text = table(given.clips, given.profile)
    if given.write is None:
        print(text)
    else:
        given.write.write_text(with_table(given.write.read_text(), text))


if __name__ == "__main__":
    main()
