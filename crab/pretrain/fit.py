"""What every stage shares: the scenes it learns from, and the loop of AdamW steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crab.synth.make import make_scene
from crab.synth.scene import Scene
from crab.train import cosine_lr

MUON_DECAY = 0.1

SCENE_SEED = 900_000
"""Scenes for pretraining have seeds from here on; `crab synth` refuses none, but nobody counts this far by hand."""

OnStep = Callable[[int, dict[str, float]], None]
Rates = Mapping[float, Sequence[nn.Parameter]]


def scenes(seed: int, count: int) -> list[Scene]:
    """`count` scenes that no data set of `crab synth` with a small seed contains."""
    return [make_scene(SCENE_SEED + seed, index) for index in range(count)]


def fit(
    parameters: Rates,
    batches: Iterator[Any],
    loss: Callable[[Any], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    on_step: OnStep,
    matrices: Rates | None = None,
) -> None:
    """Warmup, then a cosine to zero.

    Args:
        parameters: peak learning rate -> what AdamW updates at it.
        batches: endless; `steps` are taken.
        loss: a batch -> the loss, and what to report beside it.
        matrices: peak learning rate -> what Muon (Jordan 2024, torch's own) updates: a transformer's hidden matrices.
            On the tiny LLM it is where AdamW is in a third of the steps.
    """
    optimizers: list[torch.optim.Optimizer] = []
    if parameters:
        optimizers.append(
            torch.optim.AdamW(_groups(parameters), weight_decay=0.01, betas=(0.9, 0.98))
        )
    if matrices:
        # The step's size is that of AdamW, so rates mean the same for both.
        optimizers.append(
            torch.optim.Muon(
                _groups(matrices), weight_decay=MUON_DECAY, adjust_lr_fn="match_rms_adamw"
            )
        )
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    everything = [parameter for group in groups for parameter in group["params"]]
    for step, batch in zip(range(steps), batches, strict=False):
        for group in groups:
            group["lr"] = cosine_lr(step, num_steps=steps, peak=group["peak"], warmup=0.05)
        value, metrics = loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        on_step(step + 1, {"loss": value.item()} | metrics)


def split_matrices(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the module's linear layers for Muon, every other trained parameter for AdamW)."""
    linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
    # A head that shares the embedding's weight is an embedding.
    linear -= {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in module.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in linear], [p for p in trained if id(p) not in linear]


def _groups(rates: Rates) -> list[dict[str, Any]]:
    return [{"params": list(group), "peak": peak} for peak, group in rates.items()]
