"""One rank of ours without Ray: what crab_platform's worker does, for benchmarks that torchrun starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_recipe import Plan, Recipe

from crab_platform.training_config import TrainingConfig, deepspeed_config

RANKS = 2


def torchrun(script: str, *arguments: str) -> list[str]:
    """A command that runs a script once a rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(RANKS), script, *arguments]


def environment() -> dict[str, str]:
    """What Ray Train's workers get from crab_platform.training."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def training_config(folder: str | Path) -> TrainingConfig:
    """How it is run, here and under Ray Train. No checkpoint but the last."""
    return TrainingConfig(
        name="bench",
        storage_path=str(folder),
        num_workers=RANKS,
        checkpoint_every=1_000_000,
        max_failures=0,
    )


class Rank:
    """An engine as a worker has it, fresh or with what a checkpoint holds."""

    def __init__(
        self,
        plan: Plan,
        *,
        threshold: int | None = None,
        state: Mapping[str, Tensor] | None = None,
        adam_step: int = 0,
    ) -> None:
        """threshold: in the place of our `stage3_param_persistence_threshold`."""
        import deepspeed

        from crab_platform import engine_state
        from crab_platform.guards import Gate, Guard
        from crab_platform.hang import Pulse
        from crab_platform.training_worker import init_distributed

        self.config = training_config("")
        settings = deepspeed_config(self.config)
        if threshold is not None:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        init_distributed(use_gpu=False)
        self.rank = torch.distributed.get_rank()
        self.recipe = Recipe(plan)
        if state is not None:
            engine_state.put_weights(self.recipe.model, state, self.rank)
        optimizer = torch.optim.AdamW(
            self.recipe.parameters(), lr=self.recipe.learning_rate(0), weight_decay=0.0
        )
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(
            model=self.recipe.model, optimizer=optimizer, config=settings
        )
        engine_state.prepare(self.engine)
        if state is not None:
            engine_state.put_moments(self.engine, state, adam_step, RANKS, self.rank)
        self._gate, self._guard = Gate(self.engine), Guard()
        self._pulse = Pulse(None, self.rank, "")  # not started: nobody watches

    def step(self, step: int) -> dict[str, float]:
        """The worker's own function."""
        from crab_platform.learner import train_step

        return train_step(
            *(self.engine, self.recipe, self.config, step, self.rank, RANKS),
            *(self._gate, self._guard, self._pulse),
        )
