"""How much faster a sweep is with the feature cache: 8 trials on real clips, with features kept and without.

    python benchmarks/tune_cache.py [--trials 8] [--clips 16] [--steps 4]

With: one preprocess job, then trials that read its features. Without: every trial first decodes and encodes all clips
into an empty cache of its own, as training does that has none. Trials run one after the other by the same code, one
thread of torch; the clips are AV-Shapes (H.264 and AAC of 10 s), encoders and language model are the tiny preset's.

    predicted = K (F + Tr) / (F + K (Tr + R))      (reference/performance.md, 6.4)

F: seconds of the preprocess job; Tr + R: of a trial that reads from the cache; R: the part of it that it waited for
features. Both ways must show the same losses to the last bit, or no figure is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import Goals, header, versions

from crab.synth.dataset import synthesise
from crab_platform import ray_cluster
from crab_platform.catalog import Manifest
from crab_platform.session import Session
from crab_platform.storage import open_store
from crab_platform.trial import NUMBER
from jobs.features import open_manifest
from jobs.run import run_spec
from jobs.spec import PreprocessSpec, TrainSpec, parse_spec
from jobs.train import training_config
from jobs.trial_build import TrialBuild
from tune_spaces.space import load_space

SAMPLES: list[dict[str, Any]] = [
    {"num_heads": 1 + n % 8, "router_temperature": 0.1 * 100 ** (n / 7)} for n in range(8)
]


def preprocess_spec(folder: Path, samples: str) -> PreprocessSpec:
    spec = parse_spec(
        {
            "job": "preprocess",
            "name": "features",
            "runs": str(folder / "runs"),
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "data": [{"name": "clips", "samples": samples}],
            "cache": str(folder / "cache"),
            "pipeline": {"encode_actors": 2},
        }
    )
    assert isinstance(spec, PreprocessSpec)
    return spec


def train_spec(folder: Path, samples: str, steps: int) -> TrainSpec:
    spec = parse_spec(
        {
            "job": "train",
            "name": "trial",
            "runs": str(folder / "runs"),
            "data": [{"name": "clips", "samples": samples}],
            "features": {"cache": str(folder / "cache"), "manifest": "features"},
            "optimisation": {"steps": steps, "batch_size": 8, "learning_rate": 1e-3},
            "workers": {"count": 1, "micro_batches": 1},
            "validation": {"samples_per_task": 1, "every": steps},
            "parse_rate_samples": 0,
        }
    )
    assert isinstance(spec, TrainSpec)
    return spec


def quietly(work: Any) -> Any:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return work()


def features(folder: Path, samples: str) -> tuple[Manifest, float, int]:
    """The manifest of a preprocess job into an empty cache, its seconds, and how many streams it encoded."""
    spec = preprocess_spec(folder, samples)
    started = time.perf_counter()
    result = quietly(lambda: run_spec(spec))
    seconds = time.perf_counter() - started
    return (
        open_manifest(train_spec(folder, samples, 1).features, spec.runs),
        seconds,
        int(result["encoded"]),
    )


class Trials:
    """Trials of one process, as SessionTrial runs them."""

    def __init__(self, folder: Path, samples: str, steps: int, manifest: Manifest) -> None:
        spec = train_spec(folder, samples, steps)
        self._folder, self._steps = folder, steps
        build = TrialBuild(
            train=spec,
            space=load_space(["heads_and_temperature"]),
            manifest=manifest,
            adapters=folder / "adapters",
            lineage={},
        )
        self._session = Session(build, training_config(spec, folder))

    def run(self, number: int, sample: dict[str, Any]) -> tuple[float, float, float]:
        """(loss on what is held out, seconds, of them waiting for features in training)"""
        started, waited = time.perf_counter(), 0.0
        with tempfile.TemporaryDirectory(dir=self._folder) as state:
            learner = self._session.begin({NUMBER: number, **sample}, open_store(state))
            while learner.step < self._steps:
                metrics = learner.learn()
                waited += metrics["data_wait_share"] * metrics["seconds_per_step"]
            value = learner.validate()["val/loss"]
        return value, time.perf_counter() - started, waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    header("sweep-cache (B16)")
    print(versions("ray", "torch", "deepspeed"))
    goals = Goals()
    chosen = [SAMPLES[n % len(SAMPLES)] for n in range(args.trials)]
    with tempfile.TemporaryDirectory() as temporary, ray_cluster.connected(2):
        root = Path(temporary)
        samples = str(synthesise(root / "clips", args.clips, 1))
        # Ray's first job of all starts more than a job: it is not counted.
        features(root / "warm", samples)

        started = time.perf_counter()
        manifest, extract_s, encoded = features(root / "with", samples)
        trials = Trials(root / "with", samples, args.steps, manifest)
        kept = [trials.run(number, sample) for number, sample in enumerate(chosen)]
        with_s = time.perf_counter() - started

        started = time.perf_counter()
        anew, encoded_anew = [], 0
        for number, sample in enumerate(chosen):
            folder = root / f"without-{number}"
            manifest, _, count = features(folder, samples)
            encoded_anew += count
            anew.append(Trials(folder, samples, args.steps, manifest).run(number, sample))
        without_s = time.perf_counter() - started
    if [found[0] for found in kept] != [found[0] for found in anew]:
        goals.broken("the two ways learn different things")
        sys.exit(1)
    count = len(chosen)
    trial_s = sum(found[1] for found in kept[1:]) / max(1, count - 1)
    waited_s = sum(found[2] for found in kept[1:]) / max(1, count - 1)
    predicted = count * (extract_s + trial_s) / (extract_s + count * trial_s)
    measured = without_s / with_s
    print(
        f"{count} trials on {args.clips} clips: features {extract_s:.1f} s, a trial {trial_s:.1f} s (waiting for "
        f"features {waited_s:.2f} s)\nwith the cache {with_s:.1f} s ({encoded} streams encoded), without "
        f"{without_s:.1f} s ({encoded_anew}); {measured:.2f} times faster, {predicted:.2f} predicted"
    )
    goals.check("of the predicted speed-up", measured / predicted, 0.9)
    goals.check("of a trial spent waiting for features", waited_s / trial_s, 0.05, at_most=True)
    goals.check("streams encoded with the cache", encoded, 2 * args.clips, at_most=True)
    sys.exit(int(goals.failed))


if __name__ == "__main__":
    main()
