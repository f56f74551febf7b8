"""Records of sweeps as a tune job writes them (sweep.json): one with ASHA that looks like a real one, and odd ones."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from typing import Any

MAX_STEPS = 60
RUNGS = (20, 40, 60)
BASELINE = {"num_heads": 3, "router_temperature": 1.0}
HOSTILE = '<script>document.title = "owned"</script><img src=x onerror="document.title=1"> "\' & \x00 \ud800'
"""What no page may take for markup."""


def trial(number: int, **changes: Any) -> dict[str, Any]:
    """A trial that completed, but for `changes`."""
    return {
        "number": number,
        "config": {"num_heads": 3, "router_temperature": 1.0},
        "parameters": 120_000,
        "status": "completed",
        "reason": "",
        "steps": MAX_STEPS,
        "curve": [[20, 2.0], [40, 1.7], [60, 1.5]],
        "best": 1.5,
        "last": 1.5,
        "seconds": 60.0,
        "cost": 0.002,
        "failures": 0,
        "started": "2026-11-30T22:00:00+00:00",
        "ended": "2026-11-30T22:01:00+00:00",
        "node": "10.0.0.1",
        "mlflow_run": "ab" * 16,
        **changes,
    }


def stopped(number: int, steps: int = 20, **changes: Any) -> dict[str, Any]:
    """A trial that ASHA stopped at a rung; it took a second a step."""
    curve = [[step, 2.5 - step / 100] for step in RUNGS if step <= steps]
    return trial(
        number,
        **{
            "status": "stopped",
            "reason": f"stopped by asha at step {steps}: {curve[-1][1]:.2f} is not among the best third",
            "steps": steps,
            "curve": curve,
            "best": curve[-1][1],
            "last": curve[-1][1],
            "seconds": float(steps),
            "cost": steps / 10_000,
            **changes,
        },
    )


def sweep(trials: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A sweep over heads and temperature with these trials, and nothing confirmed."""
    return {
        "job": "tune",
        "name": "tune-heads",
        "metric": "val/loss",
        "mode": "min",
        "manifest": "5f" * 32,
        "identity": "c0ffee" * 6,
        "space": {
            "num_heads": {"kind": "int", "low": 1, "high": 8, "log": False},
            "router_temperature": {"kind": "float", "low": 0.1, "high": 10.0, "log": True},
        },
        "scheduler": "asha",
        "searcher": "optuna",
        "max_steps": MAX_STEPS,
        "seed": 1,
        "trials": trials,
        "confirmed": [],
        "spent": {
            "cpu_hours": 0.2,
            "gpu_hours": 0.0,
            "money": 0.048,
            "currency": "USD",
            "wall_seconds": 900.0,
        },
        "capacity": {"max_concurrent": 2, "sentence": "2 trials fit at once: 2 CPUs, 1 each."},
        "stopped_because": None,
        "adapter": "work/runs/tune-heads/adapter",
        **changes,
    }


def confirmed(label: str, values: list[float], **config: Any) -> dict[str, Any]:
    """A configuration that was run with a seed for each value."""
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return {
        "label": label,
        "config": config,
        "seeds": list(range(1, len(values) + 1)),
        "values": values,
        "mean": mean,
        "std": std,
    }


def asha_sweep(num_trials: int = 24, seed: int = 1, **changes: Any) -> dict[str, Any]:
    """Trials over heads, temperature, learning rate and targets, run two at once and stopped at three rungs.

    The loss has a valley at 3 to 4 heads and a temperature near 0.7; one trial fails, one is refused, one diverges.
    """
    chance = random.Random(seed)
    free = [datetime(2026, 11, 30, 22, tzinfo=UTC)] * 2
    reached: dict[int, list[float]] = {rung: [] for rung in RUNGS}
    trials = []
    for number in range(num_trials):
        config = {
            "num_heads": chance.randint(1, 8),
            "router_temperature": 10 ** chance.uniform(-1, 1),
            "learning_rate": 10 ** chance.uniform(-4.3, -2.7),
            "targets": chance.choice(["attention", "all"]),
        }
        made = _run(number, config, chance, reached)
        if number % 24 == 9:
            made |= {"status": "failed", "reason": "worker died: out of memory", "failures": 3}
            made |= {"curve": [], "best": None, "last": None, "steps": 7, "seconds": 21.0}
        if number % 24 == 14:
            made |= {"status": "refused", "reason": "does not fit: 9.1 GB of 8.0 GB", "steps": 0}
            made |= {"curve": [], "best": None, "last": None, "seconds": None, "cost": None}
            made |= {"started": None, "ended": None}
        if made["seconds"] is not None:
            begin = free.index(min(free))
            made["started"] = free[begin].isoformat()
            free[begin] += timedelta(seconds=made["seconds"] + 2.5)
            made["ended"] = free[begin].isoformat()
            made["cost"] = made["seconds"] * 4e-5
        trials.append(made)
    best = min((made for made in trials if made["best"]), key=lambda made: made["best"])
    record = sweep(
        trials,
        space={
            "num_heads": {"kind": "int", "low": 1, "high": 8, "log": False},
            "router_temperature": {"kind": "float", "low": 0.1, "high": 10.0, "log": True},
            "learning_rate": {"kind": "float", "low": 5e-5, "high": 2e-3, "log": True},
            "targets": {"kind": "choice", "choices": ["attention", "all"]},
        },
        confirmed=[
            confirmed("winner", [1.470, 1.493, 1.482], **best["config"]),
            confirmed("n=1", [1.602, 1.587, 1.613], **best["config"] | {"num_heads": 1}),
            confirmed("n=3, T=1", [1.499, 1.485, 1.512], **best["config"] | BASELINE),
        ],
    )
    return {**record, **changes}


def _run(
    number: int, config: dict[str, Any], chance: random.Random, reached: dict[int, list[float]]
) -> dict[str, Any]:
    heads, temperature = config["num_heads"], config["router_temperature"]
    floor = 1.38 + 0.02 * (heads - 3.5) ** 2 + 0.16 * math.log10(temperature / 0.7) ** 2
    floor += 0.1 * abs(math.log10(config["learning_rate"] / 5e-4))
    floor += chance.gauss(0, 0.02)
    if number % 24 == 17:
        floor = 7.5
    curve: list[list[float]] = []
    made = trial(number, config=config, parameters=61_440 * heads + 14_336)
    for step in range(10, MAX_STEPS + 1, 10):
        value = floor + 2.6 * math.exp(-step / 14) + chance.gauss(0, 0.012)
        curve.append([step, round(value, 4)])
        if step in reached and step < MAX_STEPS:
            others = reached[step]
            others.append(value)
            limit = sorted(others)[max(0, -(-len(others) // 3) - 1)]
            if len(others) > 2 and value > limit:
                made |= {"status": "stopped"}
                made["reason"] = (
                    f"stopped by asha at step {step}: {value:.4g} is worse than {limit:.4g}"
                )
                break
    made |= {"curve": curve, "steps": curve[-1][0], "last": curve[-1][1]}
    made |= {"best": min(value for _, value in curve)}
    made |= {"seconds": round(curve[-1][0] * (0.42 + 0.05 * heads) + 6.0, 1)}
    return made
