"""From one config to a model: LLM, adapter, projectors, mask decoder, added tokens, each seeded by itself.

The adapter goes on before the projectors exist: matching by name suffix (`q_proj`) on the whole
model would also hit whatever else has such a layer.
"""

from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from crab.model.config import AdapterConfig, CrabConfig
from crab.model.crab_model import CrabModel
from crab.model.initial import load_initial
from crab.model.llm import make_llm
from crab.model.tokens import add_new_tokens


def build_model(
    config: CrabConfig, tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel | None = None
) -> CrabModel:
    """A CrabModel in training mode. Adds Crab's tokens to `tokenizer` (in place) where it lacks
    them.

    `llm` saves loading where the caller has it already; it is wrapped in place.
    """
    table = add_new_tokens(tokenizer)
    base = make_llm(config.llm, config.seed) if llm is None else llm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted = add_adapter(base, config.adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        model = CrabModel(adapted, config, table)
    if config.initial is not None:
        load_initial(model, config.initial)
    return model.train()


def bare_llm(model: CrabModel) -> PreTrainedModel:
    """The language model of `model` without its adapter, to build another one with; `model` is done with after this."""
    if not isinstance(model.llm, PeftModel):
        return model.llm
    bare = model.llm.unload()
    bare.requires_grad_(False)
    return cast(PreTrainedModel, bare)


def add_adapter(llm: PreTrainedModel, config: AdapterConfig) -> PreTrainedModel | PeftModel:
    """Wrap `llm` with the adapter that `config` asks for (`none` returns it as it is)."""
    if config.method == "none":
        return llm
    return get_peft_model(llm, peft_config(config))


def peft_config(config: AdapterConfig) -> PeftConfig:
    """PEFT's record of the adapter; `lora` ignores num_heads and router_temperature, which it does
    not have.
    """
    common: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
    }
    if config.method == "lora":
        return LoraConfig(**common)
    # Importing registers the method with PEFT.
    from crab.adapter import InteractionLoraConfig

    return InteractionLoraConfig(
        **common, num_heads=config.num_heads, router_temperature=config.router_temperature
    )
