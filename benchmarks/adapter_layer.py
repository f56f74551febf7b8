"""Time of one adapted linear layer, forward and backward: ours, PEFT's LoRA, a loop over heads.

    python benchmarks/adapter_layer.py [--dim 1024] [--tokens 1024] [--rank 8] [--heads 4] ...

*Adapter time* is a step with the adapter less a step of the frozen layer alone (which still makes
the gradient of its input). *Saved* is what autograd keeps for backward beyond the frozen layer's.
The loop is HydraLoRA's and Crab's published form, written from its formula: for every head
`gate_i * B_i(A(drop(x))) * s`, with A run again for every head. It gets our weights, and unless
its output and all gradients agree with ours the script prints no ratio and exits 1. Candidates
take turns in every repeat, so a slow moment of the machine touches all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from crab.adapter import InteractionHeads, InteractionLoraConfig

TOLERANCE = 1e-5  # fp32, relative to the largest value; measured 1.3e-6 at the default sizes
ALPHA = 16


class OneLinear(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, dim] -> [tokens, dim]."""
        y: Tensor = self.lin(x)
        return y


class HeadLoop(nn.Module):
    """The published form: every head runs A again and makes its own [tokens, out]."""

    def __init__(self, dim: int, heads: InteractionHeads, dropout: float) -> None:
        super().__init__()
        self.base = OneLinear(dim).requires_grad_(False)
        self.a = nn.Parameter(heads.shared_a.detach().clone())
        self.router = nn.Parameter(heads.router.detach().clone())
        self.bs = nn.ParameterList(b.detach().clone() for b in heads.heads_b)
        self.scaling = heads.scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, dim] -> [tokens, dim]."""
        y: Tensor = self.base(x)
        gates = torch.softmax(x @ self.router.t(), dim=-1, dtype=torch.float32)
        for i, b in enumerate(self.bs):
            code = nn.functional.linear(self.dropout(x), self.a)
            y = y + gates[..., i].unsqueeze(-1) * nn.functional.linear(code, b) * self.scaling
        return y


def plain_lora(dim: int, rank: int, dropout: float) -> nn.Module:
    """PEFT's LoRA on the same layer."""
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["lin"])
    return get_peft_model(OneLinear(dim), config)


def step(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """One forward and backward; gradients end in x.grad and in the parameters."""
    x.grad = None
    model.zero_grad(set_to_none=True)
    y: Tensor = model(x)
    y.backward(weight)
    return y


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps for backward, parameters and x left out."""
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), x]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


def grad(tensor: Tensor) -> Tensor:
    """The gradient, which a step has just made."""
    assert tensor.grad is not None
    return tensor.grad


def worst_relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value that was wanted."""
    return ((got - want).abs().max() / want.abs().max()).item()


def disagreement(ours: nn.Module, loop: HeadLoop, x: Tensor, weight: Tensor) -> float:
    """Worst relative difference of outputs and all gradients between ours and the loop."""
    heads = next(m for m in ours.modules() if isinstance(m, InteractionHeads))
    y = step(ours, x, weight).detach()
    got = [y, grad(x), grad(heads.weight_ar), grad(heads.weight_b)]
    y = step(loop, x, weight).detach()
    grad_ar = torch.cat([grad(loop.a), grad(loop.router)])
    grad_b = torch.cat([grad(b) for b in loop.bs], dim=1)  # [out, heads * rank]
    want = [y, grad(x), grad_ar, grad_b]
    return max(worst_relative(g, w) for g, w in zip(got, want, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = InteractionLoraConfig(
        num_heads=args.heads,
        r=args.rank,
        lora_alpha=ALPHA,
        lora_dropout=args.dropout,
        target_modules=["lin"],
    )
    ours = get_peft_model(OneLinear(args.dim), config).train()
    heads = next(m for m in ours.modules() if isinstance(m, InteractionHeads))
    nn.init.normal_(heads.weight_b, std=0.02)
    loop = HeadLoop(args.dim, heads, args.dropout).train()
    models: dict[str, nn.Module] = {
        "frozen layer": OneLinear(args.dim).requires_grad_(False),
        "ours": ours,
        f"LoRA r={args.rank}": plain_lora(args.dim, args.rank, args.dropout).train(),
        f"LoRA r={args.rank * args.heads}": plain_lora(
            args.dim, args.rank * args.heads, args.dropout
        ).train(),
        "loop over heads": loop,
    }
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(args.tokens, args.dim, generator=generator).requires_grad_()
    weight = torch.randn(args.tokens, args.dim, generator=generator)

    def check() -> float:
        return disagreement(ours.eval(), loop.eval(), x, weight)  # without dropout: masks differ

    worst = check()
    if not worst <= TOLERANCE:
        print(f"ours and the loop differ by {worst:.1e} > {TOLERANCE:.0e}: no times are given")
        return 1
    ours.train()
    loop.train()

    seconds: dict[str, list[float]] = {name: [] for name in models}
    clock: Callable[[], float] = time.perf_counter
    for repeat in range(args.repeats + 3):
        for name, model in models.items():
            start = clock()
            step(model, x, weight)
            if repeat >= 3:
                seconds[name].append(clock() - start)

    print(
        f"tokens {args.tokens}, {args.dim} -> {args.dim}, rank {args.rank}, heads {args.heads}, "
        f"dropout {args.dropout}, fp32, {args.threads} thread(s), {args.repeats} repeats"
    )
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}; ours against the loop: {worst:.1e} apart")
    base = seconds["frozen layer"]
    base_saved = saved_bytes(models["frozen layer"], x)
    extra: dict[str, tuple[float, float, int]] = {}
    for name, model in models.items():
        # Differences within a repeat: both steps met the same machine.
        median = statistics.median(
            a - b
            for a, b in zip(seconds[name], base, strict=True)  # same repeat, same moment
        )
        extra[name] = (min(seconds[name]) - min(base), median, saved_bytes(model, x) - base_saved)
    print(f"{'':18} {'step ms best':>12} {'adapter ms best':>16} {'median':>8} {'saved KiB':>10}")
    for name, (best, median, saved) in extra.items():
        print(
            f"{name:18} {min(seconds[name]) * 1e3:12.2f} {best * 1e3:16.2f} {median * 1e3:8.2f} "
            f"{saved / 1024:10.0f}"
        )
    best, median, saved = extra["ours"]
    for name in list(extra)[2:]:
        other = extra[name]
        print(
            f"{name} / ours: adapter time {other[0] / best:.2f} (best), {other[1] / median:.2f} "
            f"(median); saved {other[2] / saved:.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
