"""One process that trains trial after trial: what does not differ between them is loaded once.

A trial is an ordinary run of one worker (learner.py) without ZeRO, which has nothing to share out there. Its model is
made anew by the recipe, which may take over the frozen part from the trial before it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from crab_platform import checkpoint
from crab_platform.checkpoint import Marker
from crab_platform.hang import Pulse
from crab_platform.learner import Learner
from crab_platform.storage import Store
from crab_platform.training_config import Recipe, TrainingConfig
from crab_platform.training_worker import init_distributed, repeat_exactly

Build = Callable[[Mapping[str, Any], Recipe | None], Recipe]
"""(sample, the recipe of the trial before, which is done with) -> the recipe of a trial."""


class Session:
    """Trains one trial at a time. `begin` ends the one before."""

    def __init__(self, build: Build, config: TrainingConfig) -> None:
        """`config`: as for a run; the number of workers is one, and there is no ZeRO."""
        self._build = build
        self.config = replace(config.with_workers(1), zero_stage=0, offload="none")
        self._learner: Learner | None = None
        _join_alone(use_gpu=config.use_gpu)
        repeat_exactly(use_gpu=config.use_gpu)

    @property
    def learner(self) -> Learner:
        """The trial that is trained."""
        assert self._learner is not None, "begin comes first"
        return self._learner

    def begin(self, sample: Mapping[str, Any], store: Store) -> Learner:
        """Makes the model of a trial, and goes on from the newest checkpoint in `store` if there is one."""
        before = None if self._learner is None else self._learner.recipe
        if self._learner is not None:
            self._learner.end()
            self._learner = None
        recipe = self._build(sample, before)
        learner = Learner(recipe, self.config, 0, 1, Pulse(None, 0, ""))  # nobody watches
        found = checkpoint.newest(store, learner.layout, recipe.data)
        learner.begin(checkpoint.read(store, found[0]) if found else None)
        self._learner = learner
        return learner

    def save(self, store: Store) -> Marker:
        """Writes a checkpoint and removes those before it."""
        state, marker = self.learner.state()
        name = checkpoint.new_name(marker.step)
        checkpoint.write(store, name, state, marker)
        checkpoint.remove(store, [other for other in checkpoint.names(store) if other != name])
        return marker

    def export(self) -> None:
        """Writes what was learnt to where the recipe has its adapter."""
        self.learner.recipe.export(self.learner.weights(), self.learner.step)


def _join_alone(*, use_gpu: bool) -> None:
    """A process group of this process, which DeepSpeed wants to be there."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    init_distributed(use_gpu=use_gpu)
