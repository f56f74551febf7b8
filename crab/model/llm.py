"""Language models and tokenizers: load one from a folder, or make a tiny one.

The tiny tokenizer is a byte-level BPE, so any text comes back exactly as it went in; digits stand
alone, so that "2,7" is read the same in every range. Nothing here downloads: `load_llm` reads local
safetensors and runs no remote code.
"""

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from crab.model.config import LlmConfig, tiny_llama_architecture

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` tokens; decode(encode(text)) == text for any text.

    The same texts in any order of repetition give the same tokenizer only if their counts agree:
    pass all of them.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and three special tokens.
    """
    if vocab_size < 256 + 3:
        raise ValueError(
            f"vocab_size must be at least 259 (256 bytes, {BOS}, {EOS}, {PAD}), got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(vocab_size: int, *, seed: int = 42) -> LlamaForCausalLM:
    """A Llama of about 2 M parameters with seeded random weights, float32."""
    architecture = tiny_llama_architecture(vocab_size)
    config = LlamaConfig(
        **{key: value for key, value in architecture.items() if key != "model_type"}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_llm(path: str, dtype: str = "float32") -> PreTrainedModel:
    """A causal LM from local safetensors, in evaluation mode.

    Raises:
        OSError: `path` holds no config.json or no safetensors (transformers says which).
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.eval()
    return model


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an LLM, from local files alone."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def make_llm(config: LlmConfig, seed: int) -> PreTrainedModel:
    """The LLM that `config` names: loaded from its path, or its architecture with random weights
    from `seed`.
    """
    if config.path is not None:
        return load_llm(config.path, config.dtype)
    fields: dict[str, Any] = dict(config.architecture or {})
    architecture = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=getattr(torch, config.dtype)
        )
    model.eval()
    return model
