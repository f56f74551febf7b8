"""B8, second half: `crab run` of a preprocess job over clips that are all in the cache already.

    python benchmarks/cache_warm.py [--clips 10000] [--repeats 2]

One clip of AV-Shapes is copied N times, each copy with a trailing `free` box of its own, so that all have the same
frames and different SHA-256. The spec takes one frame and one second of sound. A cold run fills an empty cache; then
warm runs do it again: nothing may be decoded, and the wall time is compared. Both times hold everything that a person
waits for: Python, Ray, MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import Goals, header, versions

CRAB = [sys.executable, "-c", "from jobs.cli import main; main()"]
SPEC = """
job: preprocess
name: {name}
runs: {work}/runs
data:
  - {{name: copies, files: {work}/clips}}
cache: {work}/cache
sampling: {{num_frames: 1, num_segments: 1}}
pipeline: {{encode_actors: 2}}
tracking: {{uri: "sqlite:///{work}/mlflow.db"}}
"""


def make_clips(work: Path, clips: int) -> None:
    """Copies of one synthetic clip."""
    folder = work / "clips"
    if folder.is_dir() and len(list(folder.iterdir())) == clips:
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(work / "shapes", ignore_errors=True)
    subprocess.run(
        [*CRAB, "synth", str(work / "shapes"), "--clips", "1", "--seed", "1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (source,) = sorted((work / "shapes").rglob("*.mp4"))[:1]
    data = source.read_bytes()
    folder.mkdir(parents=True)
    for number in range(clips):
        free = struct.pack(">I4sQ", 16, b"free", number)
        (folder / f"{number:06d}.mp4").write_bytes(data + free)


def crab_run(work: Path, name: str) -> tuple[float, float, dict[str, Any]]:
    """(wall s, CPU s of it and its children that ended, result.json) of one job."""
    spec = work / f"{name}.yaml"
    spec.write_text(SPEC.format(work=work, name=name))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [*CRAB, "run", str(spec)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"crab run failed ({done.returncode}):\n{done.stdout[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, json.loads((work / "runs" / name / "result.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("work/bench/warm"))
    args = parser.parse_args()
    work = args.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.pop("RAY_ADDRESS", None)
    make_clips(work, args.clips)
    for folder in ("cache", "runs"):
        shutil.rmtree(work / folder, ignore_errors=True)
    header(f"B8: crab run over {args.clips:,} clips")
    print(f"   {versions('ray', 'mlflow', 'torch', 'av')}", flush=True)
    cold, cpu, result = crab_run(work, "cold")
    print(
        f"   cold: {cold:.1f} s, {result['encoded']} streams of {result['decoded_files']} files, "
        f"{cold / args.clips * 1e3:.1f} ms a clip; CPU of the driver {cpu:.1f} s",
        flush=True,
    )
    goals = Goals()
    streams, manifest = result["encoded"], result["manifest"]
    if result["decoded_files"] != args.clips or result["hits"]:
        goals.broken(f"the cold run decoded {result['decoded_files']} of {args.clips} clips")
        return 1
    walls = []
    for number in range(args.repeats):
        warm, cpu, result = crab_run(work, f"warm-{number}")
        walls.append(warm)
        print(
            f"   warm: {warm:.1f} s, {result['hits']} hits, {result['decoded_files']} decoded, "
            f"in the job {result['seconds'].get('wall', 0):.2f} s (index and lookups "
            f"{result['seconds'].get('look up', 0):.2f} s); CPU of the driver {cpu:.1f} s"
        )
        if result["manifest"] != manifest:
            goals.broken("the warm run's manifest is another one")
        goals.check("decoded files", result["decoded_files"], 0, at_most=True)
        goals.check("hits missing", streams - result["hits"], 0, at_most=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    print(f"   peak memory of the largest process: {peak:.0f} MB")
    if not goals.failed:
        goals.check("warm / cold, wall of the whole command", min(walls) / cold, 0.02, at_most=True)
    return 1 if goals.failed else 0


if __name__ == "__main__":
    sys.exit(main())
