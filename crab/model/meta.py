"""A whole model without its memory: every parameter has a name, a shape and a dtype, and no elements."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig

from crab.model.build import add_adapter
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import make_llm
from crab.model.tokens import NEW_TOKENS, TokenTable


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """Of a language model with gated feed-forward layers."""

    num_layers: int
    width: int
    inner_width: int
    num_heads: int


def with_architecture(config: CrabConfig) -> CrabConfig:
    """The same model by its architecture alone: of a folder only config.json is read.

    Raises:
        FileNotFoundError: the folder, or its config.json, is not there.
    """
    if config.llm.path is None:
        return config
    if not (Path(config.llm.path) / "config.json").is_file():
        raise FileNotFoundError(f"{config.llm.path} has no config.json")
    found = AutoConfig.from_pretrained(
        config.llm.path, local_files_only=True, trust_remote_code=False
    )
    llm = LlmConfig(architecture=found.to_dict(), dtype=config.llm.dtype)
    return config.model_copy(update={"llm": llm})


def meta_model(config: CrabConfig) -> CrabModel:
    """The model that build_model makes of `config`, on torch's meta device; reads no weights and no tokenizer."""
    config = with_architecture(config).model_copy(update={"initial": None})
    assert config.llm.architecture is not None
    first = int(config.llm.architecture["vocab_size"])
    # Which ids the added tokens get is the tokenizer's business, and changes no shape.
    table = TokenTable(names=NEW_TOKENS, ids=tuple(range(first, first + len(NEW_TOKENS))))
    with torch.device("meta"):
        llm = add_adapter(make_llm(config.llm, config.seed), config.adapter)
        return CrabModel(llm, config, table).train()


def with_adapter(bare: CrabModel, adapter: AdapterConfig) -> nn.Module:
    """The language model of `bare`, a meta model without an adapter, with one; `bare` stays as it is.

    Nothing else in the model has its shape from the adapter. Of the tiny preset it takes a fifth of meta_model's time.

    Raises:
        ValueError: targets that match no layer.
    """
    assert bare.config.adapter.method == "none"
    with torch.device("meta"):
        return add_adapter(copy.deepcopy(bare.base), adapter)


def decoder_sizes(model: CrabModel) -> DecoderSizes | None:
    """Sizes of its language model; None where that has no gated feed-forward layers by Llama's names."""
    config = model.base.config.get_text_config()
    if not any(name.endswith("gate_proj") for name, _ in model.base.named_modules()):
        return None
    return DecoderSizes(
        num_layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
    )
