"""The projectors learn to say of real features what the symbols say: a regression of slots, without the LLM.

Legend: M seconds of a batch, P encoder tokens, D their width, S slots, W width of the LLM.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from crab.model.projector import Projector
from crab.pretrain.fit import OnStep, fit, split_matrices
from crab.pretrain.symbols import SymbolReader


def train_projector(
    projector: Projector,
    reader: SymbolReader,
    features: np.ndarray,
    symbols: np.ndarray,
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Trains the projector, query k for slot k.

    Args:
        features: [N, 10, P, D] of N scenes, symbols: [N, 10, S, ...] of the same.
        batch: seconds a step.
    """
    random = np.random.default_rng((seed, 5))
    reader.eval()
    with torch.no_grad():
        words = reader.words()
        spread = _vectors(reader, symbols[:50]).var()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows, seconds = (
                random.integers(features.shape[0], size=batch),
                random.integers(features.shape[1], size=batch),
            )
            order = np.lexsort((seconds, rows))  # the file is read in one direction
            rows, seconds = rows[order], seconds[order]
            yield (
                torch.from_numpy(features[rows, seconds]),
                torch.from_numpy(symbols[rows, seconds]),
            )

    def loss(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        found = projector(inputs[0])
        with torch.no_grad():
            wanted = _vectors(reader, inputs[1])
            named = F.normalize(inputs[1][..., : len(words)].float(), p=1, dim=-1)
        off = F.mse_loss(found, wanted) / spread
        # The LLM tells words apart by direction, and so does this: which word is the slot's vector most like?
        likeness = F.linear(found, F.normalize(words, dim=-1) / spread.sqrt())
        right = named.gather(-1, likeness.argmax(-1, keepdim=True)).gt(0).float().mean().item()
        told = F.cross_entropy(likeness.flatten(0, 1), named.flatten(0, 1))
        return off + 0.05 * told, {"off": off.item(), "right_slots": right}

    matrices, others = split_matrices(projector)
    fit({1e-3: others}, batches(), loss, steps=steps, on_step=on_step, matrices={5e-3: matrices})


def _vectors(reader: SymbolReader, symbols: Tensor | np.ndarray) -> Tensor:
    """What the reader makes of symbols [..., S, n], without noise: [..., S, W]."""
    given = torch.as_tensor(symbols)
    return reader(given.flatten(0, -3)).unflatten(0, given.shape[:-2])
