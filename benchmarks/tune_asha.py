"""How much less ASHA trains than random search for the same best trial, on learning curves that are known.

    python benchmarks/tune_asha.py [--trials 64] [--steps 64] [--seeds 5]

Curves are power laws of samples that a seed draws (tests/support/curve_trials.py). Random search trains all of them to
the end. ASHA is asked for the same samples by the sweep that `job: tune` runs, two trials at a time. Its budget counts
until the first trial that is as good as the best of random search has been trained to its end, so that a search that
never finds it has no figure, and regret is how much worse its own best is at the end. The bound is successive halving
without asynchrony: with a factor of 4, 64 trials and 64 steps, 19.7 times (reference/performance.md, 6.1).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from measure import Goals, header, versions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


from support.curve_trials import METRIC, CurveTrial, Faults, loss, plan
from support.sweep_driver import SPACE

from crab_platform import ray_cluster
from crab_platform.search import OptunaProposals
from crab_platform.trial_journal import TrialRecord
from crab_platform.tuning import SweepConfig, run_trials

ROOT = Path(__file__).resolve().parents[1]


def asha(seed: int, trials: int, steps: int) -> list[TrialRecord]:
    """All trials of the sweep, with the times of their results."""
    propose = OptunaProposals(space=SPACE, searcher="random", metric=METRIC, mode="min", seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        config = SweepConfig(
            mode="min", num_samples=trials, scheduler="asha", grace_steps=1, reduction_factor=4
        )
        return run_trials(
            CurveTrial, plan(folder, Faults(), num_steps=steps), config, propose
        ).trials


def units_until(trials: list[TrialRecord], steps: int, goal: float) -> int | None:
    """Steps that all trials together had made when one was at its end with a loss of `goal` or less."""
    results = sorted((r.at, t.number, r) for t in trials for r in t.results)
    for units, (_, _, result) in enumerate(results, start=1):
        if result.step == steps and result.metrics[METRIC] <= goal:
            return units
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"
    # Trials' processes import the same files.
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / n) for n in ("", "platform", "tests"))
    header("asha (B18)")
    print(versions("ray", "optuna"))
    goals = Goals()
    whole = args.trials * args.steps
    savings, regrets = [], []
    with ray_cluster.connected(2):
        for seed in range(args.seeds):
            trials = asha(seed, args.trials, args.steps)
            last = sorted(loss(trial.config, args.steps) for trial in trials)
            # Random search has to train all of them: it does not know which is the best before.
            found = min(t.results[-1].metrics[METRIC] for t in trials if t.steps == args.steps)
            units = sum(trial.steps for trial in trials)
            regrets.append(found - last[0])
            reached = units_until(trials, args.steps, last[0])
            savings.append(whole / units)
            print(
                f"seed {seed}: {units} of {whole} steps, {whole / units:.1f} times less; best {found:.4f}, of all "
                f"{last[0]:.4f} (then {last[1]:.4f}); reached after {reached or 'never'} steps"
            )
    goals.check("times less budget, median", statistics.median(savings), 8)
    goals.check("regret beside random search, median", statistics.median(regrets), 0, at_most=True)
    sys.exit(int(goals.failed))


if __name__ == "__main__":
    main()
