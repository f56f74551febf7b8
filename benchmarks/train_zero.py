"""A step of ours beside a step of others: ZeRO-3 against DDP and FSDP2, Ray Train against torchrun.

    python benchmarks/train_zero.py [--rounds 12]

B12 of the performance notes: two processes with one thread each, gloo, an 8-layer Llama of width 512 with Crab's
adapter, 1024 tokens a rank. Contenders take turns, a step each (train_turns.py). All of them make the same losses
within 1e-4 in every step, or no ratio is printed.

At this width every frozen matrix is below `stage3_param_persistence_threshold` of our configuration, so ZeRO-3 would
keep all of them whole and gather nothing. At the paper's size they are sharded. So goals are judged with a threshold
that shards them here too and still keeps the adapter's; the run as it is configured stands beside it.

DDP and FSDP2 are written as one would by hand: FSDP2 shards each decoder layer, adapter and all, and reshards it after
forward, as ZeRO-3 does; clipping, AdamW and one all-reduce of the loss a step are in all of them. Ours also judges
every update (guards.py), and under Ray Train is watched and listens for notices.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import Goals, header, versions
from torch import nn
from train_engine import RANKS, Rank, environment, torchrun, training_config
from train_recipe import Plan, Recipe, trained
from train_turns import Contender, Turns, apart, play, ratio, show

WARM_UP = 3
TOLERANCE = 1e-4
SHARDED = 100_000
"""Parameters with fewer elements stay whole: above the adapter's largest (33,024), below the smallest frozen matrix."""
NAMES = {
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "sharded": "ZeRO-3, frozen part sharded",
    "configured": "ZeRO-3 as configured",
    "ray": "the same under Ray Train",
}


def plain(plan: Plan, wrap: Any) -> None:
    """One rank of DDP or FSDP2."""
    torch.distributed.init_process_group("gloo")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    recipe = Recipe(plan)
    model = wrap(recipe.model).train()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate(0), weight_decay=0.0)
    for step in range(recipe.num_steps):
        for batch in recipe.micro_batches(step, rank, world_size):
            torch.manual_seed(recipe.seed(step, 0, rank))
            loss, _ = recipe.loss(model, batch)
            (loss * world_size).backward()  # both average gradients over ranks
            total = loss.detach().double()
            torch.distributed.all_reduce(total)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recipe.metrics({"loss": total.item()})


def distributed(model: nn.Module) -> nn.Module:
    """DDP, which reduces what is trained only."""
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def fully_sharded(model: nn.Module) -> nn.Module:
    """FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def zero3(plan: Plan, threshold: int | None) -> None:
    """One rank of what a worker of ours does, without Ray."""
    rank = Rank(plan, threshold=threshold)
    for step in range(plan.steps):
        rank.step(step)


def under_ray(plan: Plan) -> None:
    """The launcher of Ray Train's ranks."""
    from crab_platform.ray_cluster import connected
    from crab_platform.training import train

    with tempfile.TemporaryDirectory() as folder, connected(RANKS):
        train(partial(Recipe, plan), training_config(folder), lambda _metrics: None)


def contender(kind: str, turns: Turns, steps: int, folder: Path) -> Contender:
    """What starts one, not started."""
    arguments = ["--contender", kind, "--port", str(turns.port), "--steps", str(steps)]
    command = [sys.executable, __file__, *arguments]
    return Contender(
        name=kind,
        command=command if kind == "ray" else torchrun(__file__, *arguments),
        log=folder / f"{kind}.log",
        environment=environment(),
    )


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all below it."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in [root, *root.children(recursive=True)]]
    return sum(t.user + t.system for t in times)


def bench(rounds: int, folder: Path, goals: Goals) -> None:
    """Both comparisons."""
    turns = Turns()
    steps = 2 * (WARM_UP + rounds) + 1
    ddp, fsdp2, sharded, configured = (
        contender(kind, turns, steps, folder) for kind in ("ddp", "fsdp2", "sharded", "configured")
    )
    ray = contender("ray", turns, WARM_UP + rounds + 1, folder)
    first = [ddp, fsdp2, sharded, configured]
    try:
        turns.gather(first, RANKS)
        last = play(first, warm_up=WARM_UP, rounds=rounds)
        if same_losses(ddp, first[1:], goals):
            show(first, last)
            goals.check("ZeRO-3 / DDP", ratio(sharded, ddp, last), 1.3, at_most=True)
            goals.check("ZeRO-3 / FSDP2", ratio(sharded, fsdp2, last), 1.15, at_most=True)
        for one in (ddp, fsdp2, sharded):
            one.kill()

        header("the same step under torchrun and under Ray Train")
        second = [configured, ray]
        turns.gather([ray], RANKS)
        before, told = tree_cpu_s(ray.process.pid), sum(ray.cpu_s)
        before_s = sum(configured.wall_s) + sum(ray.wall_s)
        last = play(second, warm_up=WARM_UP, rounds=rounds)
        passed_s = sum(configured.wall_s) + sum(ray.wall_s) - before_s
        beside = (tree_cpu_s(ray.process.pid) - before - (sum(ray.cpu_s) - told)) / passed_s
        if same_losses(configured, [ray], goals):
            show(second, last)
            print(f"Ray's own processes used {beside:.1%} of one CPU meanwhile, in both turns")
            goals.check("Ray Train / torchrun", ratio(ray, configured, last), 1.05, at_most=True)
    finally:
        for one in (*first, ray):
            one.kill()


def same_losses(one: Contender, others: list[Contender], goals: Goals) -> bool:
    """Whether all made the same losses in all steps."""
    worst = {other.name: apart(one.losses, other.losses) for other in others}
    print(
        f"losses {one.losses[0]:.4f} ... {one.losses[-1]:.4f}; furthest from {one.name}'s: "
        + ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())
    )
    wrong = {name: d for name, d in worst.items() if not d <= TOLERANCE}
    if wrong:
        goals.broken(f"losses differ by more than {TOLERANCE:.0e}: {wrong}; no ratios")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="steps of each that count")
    parser.add_argument("--contender", choices=list(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        torch.set_num_threads(1)
        plan = Plan(name=args.contender, steps=args.steps, port=args.port)
        runs = {
            "ddp": lambda: plain(plan, distributed),
            "fsdp2": lambda: plain(plan, fully_sharded),
            "sharded": lambda: zero3(plan, SHARDED),
            "configured": lambda: zero3(plan, None),
            "ray": lambda: under_ray(plan),
        }
        runs[args.contender]()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that contenders end, too
    goals = Goals()
    header("a step of two processes: 8-layer Llama, width 512, Crab's adapter, 1024 tokens a rank")
    print(
        f"{versions('torch', 'deepspeed', 'ray', 'transformers', 'peft')}; fp32, gloo, {args.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench(args.rounds, Path(folder), goals)
    return int(goals.failed)


if __name__ == "__main__":
    sys.exit(main())
