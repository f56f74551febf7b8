"""Language models and tokenizers: load one from a folder, or make a tiny one.

The tiny tokenizer is a byte-level BPE, so any text comes back exactly as it went in; digits stand
alone, so that "2,7" is read the same in every range. Nothing here downloads: `load_llm` reads local
safetensors and runs no remote code.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
from crab.train import cosine_lr, epoch_order

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
    """A Llama of about 3 M parameters with seeded random weights, float32."""
    architecture = tiny_llama_architecture(vocab_size)
    config = LlamaConfig(
        **{key: value for key, value in architecture.items() if key != "model_type"}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    num_steps: int,
    block_length: int = 256,
    batch_size: int = 16,
    peak_lr: float = 2e-3,
    seed: int = 42,
) -> Iterator[float]:
    """Teach `model` (in place) the language of `texts`; yields the loss of each step, in nats a
    token.

    Texts are joined as bos, text, eos and cut into blocks; a block attends across its texts, which
    is how small models are usually pretrained. Draws its blocks from `seed`, and nothing else from
    a random state.

    Raises:
        ValueError: the texts do not fill one block.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = [
        t
        for text in texts
        for t in (bos, *tokenizer(text, add_special_tokens=False)["input_ids"], eos)
    ]
    num_blocks = len(stream) // block_length
    if num_blocks == 0:
        raise ValueError(
            f"the texts have {len(stream)} tokens, one block needs {block_length}; give more texts"
        )
    blocks = torch.tensor(stream[: num_blocks * block_length]).view(num_blocks, block_length)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    epochs = math.ceil(num_steps * batch_size / num_blocks)
    order = np.concatenate([epoch_order(seed, epoch, num_blocks) for epoch in range(epochs)])
    model.train()
    for step in range(num_steps):
        chosen = blocks[torch.from_numpy(order[step * batch_size : (step + 1) * batch_size])]
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, num_steps=num_steps, peak=peak_lr, warmup=0.05, floor=0.1)
        # No mask and no cache on purpose: every block is full.
        logits = model(input_ids=chosen, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), chosen[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(loss)


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
