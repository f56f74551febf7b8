"""A small Crab with invented samples and features, for the model's tests: real code, tiny sizes."""

from __future__ import annotations

from functools import cache

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crab.model.build import build_model
from crab.model.collate import Collator, Example
from crab.model.config import AdapterConfig, CrabConfig, LlmConfig, ProjectorConfig, PromptConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import train_tokenizer
from crab.samples import Sample

VIDEO_SIZE, AUDIO_SIZE = 12, 10
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "star")


def texts() -> list[str]:
    return [
        f"A {colour} {shape} rises and is heard from second {start} to second {start + 3}. "
        f"<event> {colour} {shape} </event> <range> {start},{start + 3} </range>"
        for colour in COLOURS
        for shape in SHAPES
        for start in range(7)
    ]


@cache
def _tokenizer_json() -> str:
    return train_tokenizer(texts(), vocab_size=400).backend_tokenizer.to_str()


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def config(method: str = "interaction_lora", vocab_size: int = 400) -> CrabConfig:
    projector = {
        "num_queries": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "dropout": 0.0,
    }
    return CrabConfig(
        llm=LlmConfig(
            architecture={
                "model_type": "llama",
                "vocab_size": vocab_size,
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
                # Far wider than usual. With 0.02 a random model of this size gives nearly even
                # logits, so that a wrong position or mask would hide inside the tolerance, and no
                # adapter could make it sure of a word: the final norm bounds a logit by
                # sqrt(48) x the length of a head's row.
                "initializer_range": 0.3,
            }
        ),
        video=ProjectorConfig(layer="layer_4", feature_size=VIDEO_SIZE, **projector),
        audio=ProjectorConfig(layer="tokens", feature_size=AUDIO_SIZE, **projector),
        adapter=AdapterConfig(method=method, lora_dropout=0.0),
        prompt=PromptConfig(max_length=256),
    )


def model(
    method: str = "interaction_lora", **changes: object
) -> tuple[CrabModel, PreTrainedTokenizerFast, Collator]:
    words = tokenizer()
    settings = config(method).model_copy(update=changes)
    built = build_model(settings, words)
    return built, words, Collator(settings, words, built.table)


def plain_llm(vocab_size: int = 400) -> LlamaForCausalLM:
    import torch

    architecture = config(vocab_size=vocab_size).llm.architecture or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LlamaForCausalLM(
            LlamaConfig(**{k: v for k, v in architecture.items() if k != "model_type"})
        ).eval()


def sample(
    index: int = 0, *, streams: str = "va", instruction: str = "", **changes: object
) -> Sample:
    colour, shape, start = COLOURS[index % 4], SHAPES[index % 3], index % 7
    return Sample.model_validate(
        {
            "id": f"sample-{index}",
            "task": ("ave", "avvp", "avqa")[index % 3],
            "split": "train",
            "clip": f"clip-{index}",
            "video": "clip.mp4" if "v" in streams else None,
            "audio": "clip.wav" if streams == "a" else None,
            "image": "frame.png" if "i" in streams else None,
            "instruction": instruction or "Describe the event." + " Be brief." * (index % 3),
            "reasoning": f"A {colour} {shape} rises." if index % 2 else "",
            "answer": f"<event> {colour} {shape} </event> <range> {start},{start + 3} </range>",
            "label": {},
        }
        | changes
    )


def example(
    index: int = 0,
    *,
    streams: str = "va",
    num_frames: int = 2,
    num_segments: int = 3,
    audio_tokens: int = 6,
    **changes: object,
) -> Example:
    """`streams` holds v, a, i for video, audio, image; features depend on `index` alone."""
    random = np.random.default_rng(index)
    features: dict[str, dict[str, np.ndarray]] = {}
    if "v" in streams:
        shape = (num_frames, 5, VIDEO_SIZE)
        features["video"] = {"layer_4": random.normal(size=shape).astype(np.float32)}
    if "i" in streams:
        features["image"] = {"layer_4": random.normal(size=(1, 5, VIDEO_SIZE)).astype(np.float32)}
    if "a" in streams:
        shape = (num_segments, audio_tokens, AUDIO_SIZE)
        features["audio"] = {"tokens": random.normal(size=shape).astype(np.float32)}
    return Example(sample=sample(index, streams=streams, **changes), features=features)
