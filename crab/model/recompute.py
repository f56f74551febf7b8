"""Activation checkpointing: backward computes each layer of the language model again, and only its input is kept.

Transformers does it, layer by layer, by torch.utils.checkpoint without re-entry: dropout draws the same numbers again,
the embeddings need no gradient of their own (PEFT's enable_input_require_grads is for re-entry), and losses and
gradients keep their bits. What is recorded while backward runs is recorded twice: see crab/adapter/routing.py.
"""

from __future__ import annotations

from crab.model.crab_model import CrabModel


def recompute_activations(model: CrabModel) -> None:
    """From now on, while in training mode. Raises ValueError where the language model does not know how (transformers
    says so).
    """
    model.base.activation_checkpointing_enable({"use_reentrant": False})
