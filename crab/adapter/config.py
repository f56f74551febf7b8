"""What a user chooses about an interaction-aware LoRA. Saved by PEFT as `adapter_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from crab.adapter.register import PEFT_TYPE_NAME, add_peft_type

LLAMA_LINEARS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass
class InteractionLoraConfig(PeftConfig):
    """Settings of one adapter; the defaults are Crab's (arXiv 2503.13068).

    Raises ValueError for values that have no meaning (rank 0, temperature 0, dropout 1, no
    targets).
    """

    num_heads: int = field(default=3, metadata={"help": "B matrices per target; 1 is plain LoRA."})
    r: int = field(default=8, metadata={"help": "Rank: rows of the shared A, columns of each B."})
    lora_alpha: float = field(default=16, metadata={"help": "The mixture is scaled by alpha / r."})
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "On the input of A, once, in training. The router sees the plain input."},
    )
    router_temperature: float = field(
        default=1.0,
        metadata={"help": "Divides the router's logits: small sharpens, large mixes evenly."},
    )
    target_modules: list[str] | str = field(
        default_factory=lambda: list(LLAMA_LINEARS),
        metadata={
            "help": "Names of nn.Linear modules (whole name, or its last parts), or one regular "
            "expression that a whole name must match, or 'all-linear'. Each must match something."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or one regular expression: never adapted."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train whole and save with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.peft_type = add_peft_type(PEFT_TYPE_NAME)
        for name in ("num_heads", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number, 1 or more.")
        for name in ("lora_alpha", "router_temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: expected a number above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r}: expected 0 <= dropout < 1.")
        if not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r}: expected names or a regular expression; "
                f"leave the field out for {', '.join(LLAMA_LINEARS)}."
            )
        if not isinstance(self.target_modules, str):
            self.target_modules = list(dict.fromkeys(self.target_modules))

    @property
    def scaling(self) -> float:
        """The factor s = lora_alpha / r of the equation."""
        return self.lora_alpha / self.r

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON values; sets (PEFT makes one of 'all-linear') sorted, so the file is
        always the same.
        """
        fields = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
