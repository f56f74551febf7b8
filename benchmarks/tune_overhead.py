"""What a trial costs beside its own work: 40 trials of 0.1 s, in our reused processes and in Ray Tune's default way.

    python benchmarks/tune_overhead.py [--trials 40] [--rounds 2]

Two at a time on two CPUs; torch and transformers are loaded in the trials' processes, as in training. Ours: a sweep as
`job: tune` runs it, with its journal on disk, random samples and no early stopping. Default: `Tuner(function)`, which
starts a process for each trial. All trials must show the value that their sample has, or no figure is printed. The
overhead of a trial is the time of the sweep without the start of Ray, less 0.1 s x trials / 2, by trials.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Goals, header, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


from ray import tune
from support.curve_trials import METRIC, Faults, HeavyCurveTrial, loss, plan
from support.sweep_driver import SPACE

from crab_platform import ray_cluster
from crab_platform.search import OptunaProposals
from crab_platform.tuning import SweepConfig, run_trials

ROOT = Path(__file__).resolve().parents[1]

WORK_S = 0.1
AT_A_TIME = 2


def ours(trials: int) -> float:
    """Seconds of a sweep."""
    propose = OptunaProposals(space=SPACE, searcher="random", metric=METRIC, mode="min", seed=1)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        swept = run_trials(
            HeavyCurveTrial,
            plan(folder, Faults(step_s=WORK_S), num_steps=1),
            SweepConfig(mode="min", num_samples=trials, scheduler="fifo"),
            propose,
        )
        seconds = time.perf_counter() - started
    shown = [trial.results[-1].metrics[METRIC] for trial in swept.trials]
    assert shown == [loss(trial.config, 1) for trial in swept.trials]
    assert len(shown) == trials
    return seconds


def default(trials: int) -> float:
    """The same by Ray Tune's function API as its documentation has it."""

    def trial(sample: dict[str, Any]) -> None:
        import torch  # noqa: F401 (it is the time that counts)
        import transformers  # noqa: F401 (likewise)

        time.sleep(WORK_S)
        tune.report({METRIC: loss(sample, 1)})

    space = {"x": tune.uniform(0, 1), "y": tune.loguniform(0.05, 1)}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        results = tune.Tuner(
            trial,
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=AT_A_TIME),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        seconds = time.perf_counter() - started
        assert len(results) == trials
        for result in results:
            assert result.metrics is not None
            assert result.config is not None
            assert result.metrics[METRIC] == loss(result.config, 1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"
    # Trials' processes import the same files.
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / n) for n in ("", "platform", "tests"))
    header("tune-overhead (B17)")
    print(versions("ray", "optuna", "torch", "transformers"))
    goals = Goals()
    work = WORK_S * args.trials / AT_A_TIME
    best = {"ours": float("inf"), "Tuner(function)": float("inf")}
    with ray_cluster.connected(AT_A_TIME):
        for _ in range(args.rounds):
            for name, way in (("ours", ours), ("Tuner(function)", default)):
                best[name] = min(best[name], way(args.trials))
    each = {name: (seconds - work) / args.trials for name, seconds in best.items()}
    for name, seconds in best.items():
        print(
            f"{name:16s} {seconds:7.1f} s for {args.trials} trials, {each[name]:6.3f} s overhead a trial"
        )
    goals.check("seconds a trial", each["ours"], 0.25, at_most=True)
    goals.check("of Tuner(function)", each["ours"] / each["Tuner(function)"], 0.2, at_most=True)
    sys.exit(int(goals.failed))


if __name__ == "__main__":
    main()
