"""How the routers of an adapter use their heads: load, entropy, dead heads, and an alarm when heads stay dead.

    with record_routing(model) as gates:
        model(batch)                      # and leave before backward: see routing.py
    sums(gates, batch["attention_mask"])  # to be added over micro batches and ranks
    metrics(...)                          # of the sums of a step

Sums and not means, so that parts of unequal size add up to the whole. M adapted modules, n heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crab.adapter.layer import InteractionHeads

DEAD = 1 / 20
"""A head is dead in a module where its mean weight is below this part of an even one, 1/n: it gets as little of the
gradient, and what it learns hardly reaches the output. A fresh router is far from it (means of 0.24 to 0.49, n = 3)."""
COLLAPSED = 0.05
"""A router has collapsed where the entropy of a token's weights is below this part of log n on average. A token then
gives one head 0.99 (n = 3), and the gradient of the logits, with its factor w (1 - w), is below a twentieth of that at
even weights: the router can hardly find back. Tokens may still choose different heads; dead heads tell where not."""
LOOKS = 3
"""So often in a row something must be wrong before there is an alarm: some batches are of one task."""
_WEIGHTS, _ENTROPIES, _TOKENS = "router/weights", "router/entropies", "router/tokens"


def has_choice(model: nn.Module) -> bool:
    """Whether `model` has routers with more than one head: without, there is nothing to look at."""
    return any(m.num_heads > 1 for m in model.modules() if isinstance(m, InteractionHeads))


def sums(gates: Mapping[str, Sequence[Tensor]], mask: Tensor | None = None) -> dict[str, Tensor]:
    """What `metrics` needs of one micro batch, in float64 on the gates' device.

    Args:
        gates: of record_routing: by module, [..., n] of each forward call.
        mask: [...], other than 0 where a token counts (attention_mask: padding does not); None where all do.

    Returns:
        router/weights [M, n] and router/entropies [M] (parts of log n), summed over tokens; router/tokens, a scalar.
    """
    weights, entropies, tokens = [], [], None
    for name, calls in gates.items():
        if len(calls) != 1:
            raise ValueError(
                f"{name} was recorded {len(calls)} times for one micro batch; record one forward and leave "
                "record_routing before backward, which may run forward again"
            )
        found = calls[0].double()
        num_heads = found.shape[-1]
        counts = torch.ones_like(found[..., 0]) if mask is None else (mask != 0).to(found)
        if counts.shape != found.shape[:-1]:
            raise ValueError(
                f"{name}: weights are for {tuple(found.shape[:-1])} tokens, the mask is {tuple(counts.shape)}"
            )
        weights.append((found * counts.unsqueeze(-1)).reshape(-1, num_heads).sum(0))
        entropy = torch.special.entr(found).sum(-1) / math.log(max(num_heads, 2))
        entropies.append((entropy * counts).sum())
        tokens = counts.sum()
    if tokens is None:
        raise ValueError("no module was recorded; see record_routing")
    return {
        _WEIGHTS: torch.stack(weights),
        _ENTROPIES: torch.stack(entropies),
        _TOKENS: tokens,
    }


def metrics(totals: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the added `sums` (other names in `totals` are passed over); nothing where no token was counted.

    router/entropy: mean over tokens and modules, 1 where all heads weigh the same, 0 where each token has one head.
    router/load_max, router/load_min: the largest and the smallest mean weight of any head of any module, times n.
    router/dead_heads: pairs of a module and a head that is dead there (DEAD).
    router/collapsed_layers: modules whose router has collapsed (COLLAPSED).
    """
    if _TOKENS not in totals or not float(totals[_TOKENS]):
        return {}
    tokens = float(totals[_TOKENS])
    load = totals[_WEIGHTS] / tokens * totals[_WEIGHTS].shape[-1]
    entropy = totals[_ENTROPIES] / tokens
    return {
        "router/entropy": float(entropy.mean()),
        "router/load_max": float(load.max()),
        "router/load_min": float(load.min()),
        "router/dead_heads": float((load < DEAD).sum()),
        "router/collapsed_layers": float((entropy < COLLAPSED).sum()),
    }


class Alarm:
    """Says once what is wrong, when it was wrong LOOKS times in a row. A run that is started again looks anew."""

    def __init__(self) -> None:
        self.raised = False
        self._in_a_row = {"router/dead_heads": 0, "router/collapsed_layers": 0}

    def look(self, values: Mapping[str, float]) -> str | None:
        """A sentence for people at the look that raises the alarm, else None. `values` without metrics of routers are
        no look.
        """
        if "router/entropy" not in values:
            return None
        for name in self._in_a_row:
            self._in_a_row[name] = self._in_a_row[name] + 1 if values[name] > 0 else 0
        persisting = [name for name, looks in self._in_a_row.items() if looks >= LOOKS]
        if self.raised or not persisting:
            return None
        self.raised = True
        what = {
            "router/dead_heads": "heads of the adapter are hardly used by any token",
            "router/collapsed_layers": "routers give each token to one head and can hardly learn any more",
        }
        found = " and ".join(f"{values[name]:.0f} {what[name]} ({name})" for name in persisting)
        return (
            f"{found}, {LOOKS} looks in a row. Raise adapter.router_temperature, take fewer heads (adapter.num_heads), "
            "or lower optimisation.learning_rate"
        )
