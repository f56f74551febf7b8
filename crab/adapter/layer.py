"""Interaction-aware LoRA around one linear layer.

    y = W0 x + s * sum_i softmax(R x / T)_i B_i A drop(x)          s = lora_alpha / r

(Crab, arXiv 2503.13068; the temperature T is ours, Crab has T = 1.) Every token routes itself:
nothing is averaged over the batch or over time. The sum is never a loop. With B = [B_1 .. B_n]
side by side,

    sum_i w_i B_i h = B (w outer h)

so a layer costs one skinny product with [A; R], a few operations on [tokens, n * r], and one
product with B (kernel.py, with its backward); the loop of the published code makes n temporaries
of [tokens, out] and runs A (and a new dropout mask) once per head.

Two parameters, not n + 2: under ZeRO-3 each parameter is a gather, and with one dense product
every rank uses every head in every step.

In shapes, "..." is any number of leading axes: none, [tokens], [batch, tokens] and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from crab.adapter.config import InteractionLoraConfig
from crab.adapter.kernel import InteractionKernel

BASE = "__base__"
"""PEFT's name for no adapter, among the adapter_names of a batch."""

MERGE_REFUSED = (
    "Interaction-aware LoRA cannot be merged: how its heads are mixed depends on the token, so no "
    "single weight matrix gives the same outputs. Keep the adapter beside the model "
    "(save_pretrained, PeftModel.from_pretrained), or call unload() to get the base model back."
)


class InteractionHeads(nn.Module):
    """The trainable part of one target: weight_ar = [A; R] of [r + num_heads, in] and
    weight_b = [B_1 .. B_n] of [out, num_heads * r].

    A and R start Kaiming-uniform (a = sqrt(5), each by its own fan-in, as nn.Linear does), B at
    zero: the adapter starts as an exact no-op.
    """

    def __init__(self, in_features: int, out_features: int, config: InteractionLoraConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.r = config.r
        self.scaling = config.scaling
        self.dropout = config.lora_dropout
        self.temperature = config.router_temperature
        self.weight_ar = nn.Parameter(torch.empty(self.r + self.num_heads, in_features))
        self.weight_b = nn.Parameter(torch.zeros(out_features, self.num_heads * self.r))
        self.routing_sinks: tuple[list[Tensor], ...] = ()
        """Lists that record_routing has open on this module; empty costs nothing."""
        for rows in torch.split(self.weight_ar.detach(), [self.r, self.num_heads]):
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    @property
    def shared_a(self) -> Tensor:
        """A, [r, in]: a view."""
        return self.weight_ar[: self.r]

    @property
    def router(self) -> Tensor:
        """The router R, [num_heads, in]: a view."""
        return self.weight_ar[self.r :]

    @property
    def heads_b(self) -> Tensor:
        """B_1 .. B_n, [num_heads, out, r]: a view."""
        return self.weight_b.view(-1, self.num_heads, self.r).transpose(0, 1)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        """Return base + s * sum_i w_i B_i A drop(x).

        x: [..., in]; base: W0 x, [..., out]. Computed in the adapter's dtype (under autocast in
        autocast's); the result has the wider dtype of that and base's.
        """
        dtype = self.weight_ar.dtype
        device = x.device.type
        # Autocast leaves fp64 alone.
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        y, gates = InteractionKernel.apply(
            x,
            base,
            self.weight_ar,
            self.weight_b,
            self.r,
            self.scaling,
            self.temperature,
            self.dropout if self.training else 0.0,
            dtype,
        )
        for sink in self.routing_sinks:
            sink.append(gates.t().reshape(*x.shape[:-1], self.num_heads).float())
        return y

    def extra_repr(self) -> str:
        """Settings in print(model)."""
        return (
            f"num_heads={self.num_heads}, r={self.r}, scaling={self.scaling:g}, "
            f"dropout={self.dropout:g}, temperature={self.temperature:g}"
        )


class InteractionLoraLinear(nn.Module, BaseTunerLayer):
    """A frozen nn.Linear and, by adapter name, the heads that PEFT has put beside it."""

    adapter_layer_names: tuple[str, ...] = ("ilora_heads",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: InteractionLoraConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ilora_heads = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self.merged_adapters: list[str] = []
        linear = self.get_base_layer()
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"Interaction-aware LoRA adapts nn.Linear, not {type(linear).__name__}; "
                f"name linear layers in target_modules."
            )
        # As attributes: under ZeRO-3 the weight's own shape is [0] between gathers.
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: InteractionLoraConfig) -> None:
        """Add, or make anew, one adapter, on the base layer's device and in its dtype."""
        heads = InteractionHeads(self.in_features, self.out_features, config)
        heads.train(self.training)
        self.ilora_heads[adapter_name] = heads
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active_heads(self) -> list[InteractionHeads]:
        """The heads that take part in forward, in the order of the active adapters."""
        heads = [self.ilora_heads[n] for n in self.active_adapters if n in self.ilora_heads]
        return [h for h in heads if isinstance(h, InteractionHeads)]

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """x [..., in] -> [..., out] in the base layer's dtype; several active adapters add up.

        adapter_names: one name for each x[i], instead of the active adapters; BASE is the base
        layer alone, as is an adapter that does not have this layer. Raises ValueError if their
        number is not len(x).
        """
        if adapter_names is not None and len(adapter_names) != len(x):
            raise ValueError(
                f"adapter_names needs one name for each sample: got {len(adapter_names)} and "
                f"{len(x)}."
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        if adapter_names is None:
            for heads in self.active_heads():
                # Casts x itself: a cast made here would be kept for backward.
                result = heads(x, result)
            return result.to(dtype)
        for name in set(adapter_names).intersection(self.ilora_heads):
            rows = [row for row, other in enumerate(adapter_names) if other == name]
            result[rows] = self.ilora_heads[name](x[rows], result[rows]).to(dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused; see MERGE_REFUSED."""
        raise NotImplementedError(MERGE_REFUSED)

    def unmerge(self) -> None:
        """Nothing is ever merged, so there is nothing to undo."""
