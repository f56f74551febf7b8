"""Plan of a million clips against a real store: seconds, peak memory and requests.

    python benchmarks/plan_scale.py [--clips 1000000] [--commits 400] [--folder DIR] [--snapshots/--no-snapshots]

Keys are made up: there are no media and no packs, but commits (and snapshots) as a job writes them, in a SeaweedFS
on loopback, or in a folder. Of the clips that are planned 90 % are hits; of the rest half were encoded with other
weights and half were never seen. The plan runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.clock import SYSTEM
from crab_platform.explain import NO_MEDIA
from crab_platform.identity import canonical_json
from crab_platform.plan import Clip, make_plan
from crab_platform.snapshots import ROWS, write_snapshot
from crab_platform.storage import Store, open_store
from crab_platform.work import StreamWork, Work

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "servers"))
from seaweedfs import seaweedfs

OTHER_WEIGHTS = "11" * 32
HIT, OTHERWISE = 0.90, 0.95


def media_of(number: int) -> str:
    return sha256(b"clip %d" % number).hexdigest()


def url_of(number: int) -> str:
    return f"s3://clips/{number // 10000:04d}/{number:08d}.mp4"


def version_of(number: int) -> str:
    return f"etag:{1_500_000 + number % 1000}:{number:032x}"


def made_up_work(store_url: str, weights: str = "22" * 32) -> Work:
    """One stream, with a record as large as that of a real encoder."""
    return Work(
        name="made-up",
        by="a benchmark",
        open_cache=lambda: FeatureCache(open_store(store_url)),
        streams={
            "video": StreamWork(
                stream="video",
                sampling={"kind": "uniform-frames", "num_frames": 10, "size": 224},
                encoder={
                    "name": "clip-1024w-14p-224px",
                    "weights_sha256": weights,
                    "layers": [14, 22, 23],
                    "compute_version": 1,
                    "compute_dtype": "float32",
                    "architecture": ["hidden_size=1024", "num_attention_heads=16", "patch_size=14"],
                    "image_mean": ["0.48145466", "0.4578275", "0.40821073"],
                    "image_std": ["0.26862954", "0.26130258", "0.27577711"],
                },
                dtype="float16",
                request=None,
                make_encoder=_no_encoder,
            )
        },
        decode={"policy": "frames-decord-then-pyav.sound-pyav", "version": 1},
        make_decoder=_no_encoder,
    )


def _no_encoder() -> Any:
    raise AssertionError("a plan encodes nothing")


def fill(store: Store, clips: int, num_commits: int, with_snapshots: bool) -> int:
    """Commits of all clips that were seen; returns the number of rows."""
    seen = int(clips * OTHERWISE)
    hits = int(clips * HIT)
    kinds = [made_up_work(store.url), made_up_work(store.url, OTHER_WEIGHTS)]
    tensors = commits.specs_to_json(())
    per_commit = -(-seen // num_commits)
    snapshot: list[Any] = []
    rows = 0
    for start in range(0, seen, per_commit):
        numbers = range(start, min(seen, start + per_commit))
        shas = [media_of(n) for n in numbers]
        right = [n < hits for n in numbers]
        digests = [kind.key_digests("video", shas) for kind in kinds]
        keys = [digests[0 if ok else 1][i] for i, ok in enumerate(right)]
        text = [canonical_json(kind.key("video", NO_MEDIA).record()).decode() for kind in kinds]
        size = len(shas)
        columns = {
            "schema": [commits.COMMIT_SCHEMA] * size,
            "key": keys,
            "pack": [commits.pack_path(SYSTEM.new_id())] * size,
            "offset": [i * 122_880 for i in range(size)],
            "length": [122_880] * size,
            "blake3": [sha256(key.encode()).hexdigest() for key in keys],
            "tensors": [tensors] * size,
            "record": [
                text[not ok].replace(NO_MEDIA, sha) for ok, sha in zip(right, shas, strict=True)
            ],
            "source_url": [url_of(n) for n in numbers],
            "source_version": [version_of(n) for n in numbers],
            "media_sha256": shas,
            "run": [f"{start:032x}"] * size,
            "experiment": ["made-up"] * size,
            "team": ["vision"] * size,
            "decode_s": [0.2] * size,
            "encode_s": [0.05] * size,
            "device": ["cpu"] * size,
            "tolerance": [0.0] * size,
        }
        table = pa.table(columns, schema=commits.COLUMNS)
        identifier = SYSTEM.new_id()
        store.create(f"{commits.COMMITS}/{identifier}.parquet", commits.table_to_parquet(table))
        rows += size
        if with_snapshots:
            named = table.select(commits.INDEXED).append_column(
                "commit", pa.array([identifier] * size, pa.string())
            )
            snapshot.append(named)
            if sum(one.num_rows for one in snapshot) >= ROWS or start + per_commit >= seen:
                write_snapshot(store, snapshot)
                snapshot = []
    return rows


class Counting(Store):
    """A store that counts what it is asked."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.url = store.url
        self.requests: Counter[str] = Counter()
        self.num_bytes = 0

    def list(self, prefix: str = "") -> list[str]:
        found = self._store.list(prefix)
        self.requests["LIST"] += max(1, -(-len(found) // 1000))
        return found

    def read(self, path: str) -> bytes:
        data = self._store.read(path)
        self.requests["GET"] += 1
        self.num_bytes += len(data)
        return data

    def size(self, path: str) -> int:
        self.requests["HEAD"] += 1
        return self._store.size(path)

    def create(self, path: str, data: Any) -> None:
        raise AssertionError("a plan writes nothing")

    def delete(self, path: str) -> None:
        raise AssertionError("a plan deletes nothing")

    def _read_piece(self, path: str, piece: Any) -> memoryview:
        self.requests["GET"] += 1
        return self._store._read_piece(path, piece)


def clips_of(count: int) -> Iterator[Clip]:
    for n in range(count):
        version = version_of(n)
        yield Clip(
            name=f"{n:08d}.mp4",
            url=url_of(n),
            streams=("video",),
            version=version,
            num_bytes=int(version.split(":")[1]),
        )


def measure(url: str, clips: int) -> dict[str, Any]:
    """In a process of its own."""
    before = peak_mb()
    store = Counting(open_store(url))
    moments: dict[str, float] = {}
    started = time.perf_counter()
    plan = make_plan(
        FeatureCache(store),
        made_up_work(url),
        clips_of(clips),
        on_progress=lambda done: (
            moments.setdefault("first", time.perf_counter() - started)
            and moments.__setitem__("last", time.perf_counter() - started)
        ),
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "seconds_first_chunk": moments["first"],
        "seconds_looked_up": moments["last"],
        "peak_rss_mb": peak_mb(),
        "rss_before_mb": before,
        "requests": dict(store.requests),
        "read_mb": store.num_bytes / 1e6,
        "statuses": dict(plan.statuses),
        "reasons": {counted.group.reason: counted.count for counted in plan.groups},
    }


def peak_mb() -> float:
    """Of this process alone: what getrusage tells begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--commits", type=int, default=400)
    parser.add_argument(
        "--folder", type=Path, help="a new folder as the store, instead of SeaweedFS"
    )
    parser.add_argument("--snapshots", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--measure", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.clips)))
        return
    with tempfile.TemporaryDirectory(prefix="crab-plan-") as scratch:
        server = nullcontext() if given.folder else seaweedfs(Path(scratch))
        with server as running:
            if running is not None:
                os.environ.update(running.env())
            url = str(given.folder) if running is None else running.url("plan")
            started = time.perf_counter()
            rows = fill(open_store(url), given.clips, given.commits, given.snapshots)
            filled = time.perf_counter() - started
            command = [sys.executable, __file__, "--measure", url, "--clips", str(given.clips)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
    where = "a folder" if given.folder else "SeaweedFS on loopback"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {where}"
    )
    print(
        f"{rows:,} entries in {given.commits} commits, snapshots: {given.snapshots}; written in {filled:.0f} s"
    )
    print(
        f"plan of {given.clips:,} clips: {found['seconds']:.1f} s "
        f"(index and first chunk {found['seconds_first_chunk']:.1f} s, all looked up after "
        f"{found['seconds_looked_up']:.1f} s, the rest explains)"
    )
    print(f"  {given.clips / found['seconds']:,.0f} clips a second")
    print(
        f"  peak memory {found['peak_rss_mb']:,.0f} MB, of which {found['rss_before_mb']:,.0f} MB before it began"
    )
    requests = ", ".join(f"{count:,} {verb}" for verb, count in found["requests"].items())
    print(f"  requests: {requests}; {found['read_mb']:,.0f} MB read")
    print(f"  {found['statuses']}; {found['reasons']}")
    expected = {
        "hit": int(given.clips * HIT),
        "miss": given.clips - int(given.clips * HIT),
        "set_aside": 0,
    }
    assert found["statuses"] == expected, f"expected {expected}"
    assert found["reasons"]["key_differs"] == rows - expected["hit"]


if __name__ == "__main__":
    main()
