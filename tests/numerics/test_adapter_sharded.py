"""The adapter under ZeRO-3 with nothing kept whole: its parameters lie in halves on two processes between forward and
backward, and its gradients are those of one process that never heard of DeepSpeed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from support.ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crab.adapter import InteractionHeads, InteractionLoraConfig
from crab_platform.training_worker import init_distributed

WIDTH, STEPS, TOKENS, LR = 48, 3, 12, 0.1
TOLERANCE = 1e-6  # relative; measured 2.1e-7: two halves of a batch are summed in another order


class Stack(nn.Module):
    """Two adapted layers; the second is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        y: Tensor = checkpoint(self.second, hidden, use_reentrant=False)
        return y.square().mean()


def make_model() -> nn.Module:
    config = InteractionLoraConfig(
        target_modules=["first", "second"], lora_dropout=0.0, router_temperature=0.5
    )
    model = get_peft_model(Stack(), config).train()
    for heads in (m for m in model.modules() if isinstance(m, InteractionHeads)):
        nn.init.normal_(heads.weight_b, std=0.3)
    return model


def batch(step: int) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def alone() -> dict[str, Tensor]:
    """Adapter weights after the steps, in one process."""
    model = make_model()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(weights.values(), lr=LR)
    for step in range(STEPS):
        model(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in weights.items()}


def sharded(out: Path) -> None:
    """One of two processes: the same steps, each on its half of the batch."""
    import deepspeed

    init_distributed(use_gpu=False)
    rank = torch.distributed.get_rank()
    model = make_model()
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(weights.values(), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1_000_000,
        },
    )
    for step in range(STEPS):
        loss = engine(batch(step)[rank])
        # The claim of the test: forward is over and nobody holds a whole parameter.
        whole = [name for name, weight in weights.items() if weight.numel()]
        assert whole == [], (step, whole)
        engine.backward(loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(weights.values())):
        if rank == 0:
            torch.save({name: weight.detach().clone() for name, weight in weights.items()}, out)
    torch.distributed.destroy_process_group()


def test_parameters_released_between_forward_and_backward(tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path / "weights.pt")
    got, want, fresh = (
        torch.load(tmp_path / "weights.pt"),
        alone(),
        dict(make_model().named_parameters()),
    )
    assert got.keys() == want.keys()
    for name, weight in want.items():
        moved = (weight - fresh[name]).abs().max()
        assert moved > 0, name
        assert (got[name] - weight).abs().max() <= TOLERANCE * weight.abs().max(), name


if __name__ == "__main__":
    sharded(Path(sys.argv[1]))
