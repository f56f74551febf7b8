"""A language model's forward over packed samples, in which each sees itself alone.

transformers knows packed rows too, but only by guessing: it looks at position_ids where no attention mask and no cache
are given, and where one of both is, samples silently see those before them. Its dense mask also computes the attention
over all that it then leaves out. Here an attention function of our own, registered by transformers' AttentionInterface,
runs transformers' sdpa attention for one sample after the other, causal and without a mask. The linear layers around it
run once over all samples.

That every layer used it is counted. A model whose layers do anything else with a row is refused.

Legend: L length of the row, W width of the LLM, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_NAME = "crab_within_samples"
_INSTEAD = "train with optimisation.batches: padded"


@dataclass(kw_only=True)
class _Samples:
    """Travels with a forward to every attention layer."""

    lengths: list[int]
    layers: set[int] = field(default_factory=set)
    """Attention modules that kept the samples apart."""


def packed_hidden_states(
    base: PreTrainedModel, decoder: nn.Module, embeds: Tensor, position_ids: Tensor, lengths: Tensor
) -> Tensor:
    """Last hidden states [1, L, W] of the samples in a row, as if each were alone.

    From the first call on, `base` attends by the function of this module, which is transformers' sdpa for all that is
    not packed.

    Args:
        base: the causal LM that `decoder` is part of.
        embeds: [1, L, W].
        position_ids: [1, L], from 0 in each sample.
        lengths: int64 [N], positions of each sample; they add up to L.

    Raises:
        ValueError: the lengths do not fit, or the model cannot keep samples apart.
    """
    samples = _Samples(lengths=lengths.tolist())
    if embeds.shape[0] != 1 or embeds.shape[1] != sum(samples.lengths):
        raise ValueError(
            f"packed samples of {sum(samples.lengths)} positions in rows of {tuple(embeds.shape[:2])}, expected one "
            "row of as many; collate again"
        )
    _attend_within_samples(base, max(samples.lengths))
    # For whatever does not go through our function: it sees nothing, and the layers that did are too few.
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=nothing,
        position_ids=position_ids,
        use_cache=False,
        crab_samples=samples,
    )
    num_layers = base.config.get_text_config().num_hidden_layers
    if len(samples.layers) != num_layers:
        raise ValueError(
            f"{type(base).__name__}: {len(samples.layers)} of {num_layers} layers kept packed samples apart; {_INSTEAD}"
        )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _attend_within_samples(base: PreTrainedModel, longest: int) -> None:
    """Makes the model use our attention function, once; raises ValueError where its layers need another."""
    config = base.config.get_text_config()
    strange = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    window = getattr(config, "sliding_window", None)
    if strange or (window is not None and longest > window):
        why = f"layers of {', '.join(sorted(strange))}" if strange else f"a window of {window}"
        raise ValueError(
            f"{type(base).__name__} has {why}: it cannot keep packed samples of {longest} positions apart; {_INSTEAD}"
        )
    if config._attn_implementation == _NAME:
        return
    if config._attn_implementation == "sdpa":
        base.set_attn_implementation(_NAME)
    if config._attn_implementation != _NAME:
        raise ValueError(
            f"{type(base).__name__} attends by {config._attn_implementation!r} and not by transformers' sdpa: packed "
            f"samples would see each other; {_INSTEAD}"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    crab_samples: _Samples | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """[1, H, L, D] each -> [1, L, H, D]: causal attention within each sample, as transformers' sdpa computes it."""
    if crab_samples is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    is_causal = settings.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{type(module).__name__} attends in both directions; {_INSTEAD}")
    if settings.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a bias by positions; {_INSTEAD}")
    crab_samples.layers.add(id(module))
    parts = [tensor.split(crab_samples.lengths, dim=2) for tensor in (query, key, value)]
    outputs = [
        sdpa_attention_forward(module, q, k, v, None, is_causal=True, **settings)[0]
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
