"""What the training benchmarks train: a Llama with the interaction LoRA, from the same seed, on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from train_turns import Turn
from transformers import LlamaConfig, LlamaForCausalLM

from crab.adapter import LLAMA_LINEARS, InteractionHeads, InteractionLoraConfig

VOCABULARY = 4096
LONGEST = 1024
LEARNING_RATE = 1e-3


def adapted_llama(width: int = 512, layers: int = 8) -> nn.Module:
    """Random and frozen, with Crab's adapter (three heads, r=8, dropout 0.05) on all seven linears of a layer.

    The ratio of feed-forward to width is Llama-2's.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=LONGEST,
        attn_implementation="sdpa",
        use_cache=False,
    )
    adapter = InteractionLoraConfig(
        num_heads=3, r=8, lora_alpha=16, lora_dropout=0.05, target_modules=list(LLAMA_LINEARS)
    )
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    for heads in (m for m in model.modules() if isinstance(m, InteractionHeads)):
        nn.init.normal_(heads.weight_b, std=0.02)  # else A would have no gradient in the first step
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter."""
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, for how long, and where the ranks wait for their turns."""

    name: str
    steps: int
    port: int | None = None
    """Of Turns; None: without turns."""
    width: int = 512
    layers: int = 8
    tokens: int = 1024
    """A rank and step."""


class Recipe:
    """For crab_platform.training, and for the loops that need no DeepSpeed. One sample of random tokens a rank."""

    data = "random"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.num_steps = plan.steps
        self.model = adapted_llama(plan.width, plan.layers)
        self._turn: Turn | None = None
        self._loss = math.nan
        self._world_size = 1

    def parameters(self) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": trained(self.model)}]

    def learning_rate(self, step: int) -> float:
        """The same in every step."""
        return LEARNING_RATE

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Tensor]:
        """Waits for the turn, then gives token ids [1, tokens]."""
        self._world_size = world_size
        if self.plan.port is not None:
            if self._turn is None:
                self._turn = Turn(self.plan.port, self.plan.name, rank)
            self._turn.wait(self._loss)
        generator = torch.Generator().manual_seed(step * world_size + rank)
        yield torch.randint(VOCABULARY, (1, self.plan.tokens), generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the mean over all tokens."""
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss / self._world_size, {}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """None of its own; keeps the loss, to be told at the next turn."""
        self._loss = sums["loss"]
        return {}

    def seed(self, step: int, micro: int, rank: int) -> int:
        """Of dropout."""
        return 1_000 * step + rank

    def export(self, state: Mapping[str, Tensor], step: int) -> None:
        """Nothing: time is all that is wanted."""
