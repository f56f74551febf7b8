"""Which modules an adapter goes to, checked before any of them is touched.

PEFT raises only if no target at all matches. A misspelt name among seven then trains six targets,
and nobody notices for weeks. Here every name must match something that can be adapted, or the
error names it and what it may have meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from torch import nn

NUM_SHOWN = 8


def name_matches(target: str, module_name: str) -> bool:
    """PEFT's rule for a listed name: the whole name, or its last dotted parts."""
    return module_name == target or module_name.endswith(f".{target}")


def nearest_names(target: str, linear_names: Iterable[str]) -> list[str]:
    """Names of linear modules closest to `target`, nearest first; some of them in order if none
    is close.

    Compared with as many dotted parts as `target` has, so `layers.0.q_prj` finds
    `layers.0.q_proj`.
    """
    num_parts = target.count(".") + 1
    tails = list(dict.fromkeys(".".join(n.split(".")[-num_parts:]) for n in linear_names))
    return difflib.get_close_matches(target, tails, n=3, cutoff=0.5) or tails[:NUM_SHOWN]


def check_targets(
    targets: Collection[str] | str, matched: dict[str, nn.Module], names: dict[str, nn.Module]
) -> None:
    """Raise ValueError unless every target matches and every match is an nn.Linear.

    targets: names, or one regular expression; matched: the modules that PEFT would adapt (name ->
    module, exclusions already taken out); names: all modules of the model that could be targets.
    """
    linear_names = [name for name, module in names.items() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        unmatched = [] if matched else [targets]
    else:
        unmatched = sorted(t for t in targets if not any(name_matches(t, name) for name in matched))
    if unmatched:
        lines = []
        for target in unmatched:
            hint = ", ".join(nearest_names(target, linear_names)) or "none: it has no nn.Linear"
            excluded = not isinstance(targets, str) and any(name_matches(target, n) for n in names)
            why = (
                " (only modules that exclude_modules or modules_to_save take out)"
                if excluded
                else ""
            )
            lines.append(f"  {target!r} matches nothing{why}; nearest in this model: {hint}")
        raise ValueError(
            "target_modules of the interaction-aware LoRA:\n"
            + "\n".join(lines)
            + "\nCorrect the names or leave them out; model.named_modules() lists all."
        )
    wrong = {name: module for name, module in matched.items() if not isinstance(module, nn.Linear)}
    if wrong:
        shown = ", ".join(
            f"{name} ({type(m).__name__})" for name, m in list(wrong.items())[:NUM_SHOWN]
        )
        raise ValueError(
            f"target_modules match {len(wrong)} modules that are not nn.Linear: {shown}. "
            f"Interaction-aware LoRA adapts nn.Linear only; name the linear layers inside them."
        )
