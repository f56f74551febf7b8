"""Interaction-aware LoRA (Crab, arXiv 2503.13068) as a PEFT method: importing this package
registers it.

    import crab.adapter
    model = peft.get_peft_model(model, crab.adapter.InteractionLoraConfig(num_heads=3))

After that everything is plain PEFT: save_pretrained, PeftModel.from_pretrained, add_adapter,
disable_adapter, and so on.
"""

from crab.adapter.config import LLAMA_LINEARS, InteractionLoraConfig
from crab.adapter.layer import InteractionHeads, InteractionLoraLinear
from crab.adapter.model import InteractionLoraModel
from crab.adapter.register import register
from crab.adapter.routing import record_routing

__all__ = [
    "LLAMA_LINEARS",
    "InteractionHeads",
    "InteractionLoraConfig",
    "InteractionLoraLinear",
    "InteractionLoraModel",
    "record_routing",
]

register(InteractionLoraConfig, InteractionLoraModel)
