"""How long training waits for its batches, with and without prefetch, where features lie in an S3 on loopback.

    python benchmarks/train_reading.py [--steps 12] [--rounds 3]

A train job's own recipe on the tiny preset: random features in a SeaweedFS, read by the manifest, put together into
packed batches, learnt from with forward and backward; one process, one thread for torch. The share is of the time from
asking for a batch to having it, in the time of all steps but the first: its batches nobody could have made before.
Both ways take turns, and must give the same losses to the last bit, or no figure is printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Goals, header, versions

from crab_platform.cache import FeatureCache
from crab_platform.storage import open_store
from jobs.spec import TrainSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "servers"))
from seaweedfs import seaweedfs
from support.random_features import Job, write_job

BATCH, MICRO_BATCHES, GRID = 16, 4, 14
"""Samples a step, in so many parts; a frame has as many tokens as one of CLIP's with patches of 16."""


@dataclass(frozen=True)
class Round:
    """One run over all steps, without its first step."""

    waiting_s: float
    total_s: float
    losses: list[float]

    @property
    def share(self) -> float:
        return self.waiting_s / self.total_s


def with_prefetch(job: Job, ahead: int) -> Job:
    record = job.spec.model_dump()
    record["workers"]["prefetch"] = ahead
    return Job(spec=TrainSpec.model_validate(record), manifest=job.manifest, adapter=job.adapter)


def run(job: Job) -> Round:
    """All steps of the job as one worker takes them, without an optimizer."""
    recipe = job.recipe()
    waiting_s = started = 0.0
    losses = []
    for step in range(recipe.num_steps):
        if step == 1:
            waiting_s, started = 0.0, time.perf_counter()
        flow = recipe.micro_batches(step, 0, 1)
        while True:
            asked = time.perf_counter()
            batch = next(flow, None)
            waiting_s += time.perf_counter() - asked
            if batch is None:
                break
            loss, _ = recipe.loss(recipe.model, batch)
            loss.backward()
            losses.append(loss.item())
        recipe.model.zero_grad()
    total_s = time.perf_counter() - started
    recipe.close()
    return Round(waiting_s, total_s, losses)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    goals = Goals()
    header(f"waiting for data: {args.steps} steps of {BATCH} samples in {MICRO_BATCHES} parts")
    print(f"{versions('torch', 'obstore')}; fp32, one thread, {args.rounds} rounds")
    with tempfile.TemporaryDirectory(prefix="crab-reading-") as scratch:
        with seaweedfs(Path(scratch) / "server") as server:
            os.environ.update(server.env())
            url = server.url("cache")
            job = write_job(
                Path(scratch) / "job",
                url,
                count=96,
                grid=GRID,
                features=FeatureCache(open_store(url), pack_bytes=32 << 20),
                steps=args.steps,
                batch_size=BATCH,
                workers={"count": 1, "micro_batches": MICRO_BATCHES},
            )
            size = sum(row.entry.length for row in job.manifest.ready() if row.entry)
            print(f"{size / 1e6:.0f} MB of features of {len(job.manifest.ready())} streams")
            ways = {ahead: with_prefetch(job, ahead) for ahead in (0, 2)}
            rounds: dict[int, list[Round]] = {ahead: [] for ahead in ways}
            for _ in range(args.rounds):
                for ahead, way in ways.items():
                    rounds[ahead].append(run(way))
    expected = rounds[0][0].losses
    if any(found.losses != expected for runs in rounds.values() for found in runs):
        goals.broken("losses differ with prefetch or from round to round: no times")
        return 1
    print(f"{'prefetch':>8} {'waiting':>8} {'least':>7} {'waiting ms a batch':>19} {'s a step':>9}")
    for ahead, runs in rounds.items():
        num_batches = (args.steps - 1) * MICRO_BATCHES
        print(
            f"{ahead:8} {statistics.median(r.share for r in runs):8.2%} {min(r.share for r in runs):7.2%} "
            f"{statistics.median(r.waiting_s for r in runs) / num_batches * 1e3:19.1f} "
            f"{statistics.median(r.total_s for r in runs) / (args.steps - 1):9.3f}"
        )
    shares = [r.share for r in rounds[2]]
    goals.check("share of waiting with prefetch", statistics.median(shares), 0.02, at_most=True)
    return int(goals.failed)


if __name__ == "__main__":
    sys.exit(main())
