"""A small Crab with invented samples and features, for the model's tests: real code, tiny sizes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crab.model.build import build_model
from crab.model.collate import Collator, Example
from crab.model.config import (
    AdapterConfig,
    CrabConfig,
    LlmConfig,
    MaskDecoderConfig,
    ProjectorConfig,
    PromptConfig,
)
from crab.model.crab_model import CrabModel
from crab.model.llm import train_tokenizer
from crab.samples import MaskRef, Sample
from crab.tasks.mask_answer import MaskItem, format_mask_answer

VIDEO_SIZE, AUDIO_SIZE = 12, 10
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "star")
NUM_CLASSES = 5


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
        masks=MaskDecoderConfig(
            layers=("layer_2", "layer_4"),
            feature_size=VIDEO_SIZE,
            width=16,
            num_queries=4,
            num_heads=2,
            intermediate_size=32,
            output_size=16,
            num_classes=NUM_CLASSES,
        ),
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


def place_features(random: np.random.Generator, num_frames: int, grid: int) -> np.ndarray:
    """[frames, grid * grid, VIDEO_SIZE] float32: waves that tell each place, and a little noise."""
    x, y = np.meshgrid(np.arange(grid) / grid, np.arange(grid) / grid)
    waves = [
        f(2 * np.pi * k * axis) for axis in (x, y) for k in (0.5, 1, 2) for f in (np.sin, np.cos)
    ]
    places = np.stack(waves, axis=-1).reshape(1, grid * grid, VIDEO_SIZE)
    noise = random.normal(0, 0.1, (num_frames, grid * grid, VIDEO_SIZE))
    return (places + noise).astype(np.float32)


def mask_example(
    folder: Path, index: int = 0, *, task: str = "ms3", grid: int = 4, **changes: object
) -> Example:
    """Four frames; one object masked in seconds 0 and 1, another in second 3. Masks are 32 x 32 PNGs in `folder`.

    Second 2 has a mask file too, an empty one, and no span.
    """
    first, second = (
        MaskItem(start_s=0, end_s=2, names=(f"{COLOURS[index % 4]} circle",)),
        MaskItem(start_s=3, end_s=4, names=(f"{COLOURS[index % 4]} star",)),
    )
    refs = []
    for frame in range(4):
        pixels = np.zeros((32, 32), np.uint8)
        if frame in (0, 1):
            pixels[4:14, 4 + 2 * (index % 4) : 20] = 1 + index % 4
        if frame == 3:
            pixels[18:30, 6:26] = 1 + (index + 1) % 4
        path = folder / f"{task}-{index}-{frame}.png"
        Image.fromarray(pixels).save(path)
        refs.append(MaskRef(frame=frame, file=str(path)))
    random = np.random.default_rng(index)
    layers = {name: place_features(random, 4, grid) for name in ("layer_2", "layer_4")}
    # What stands in a frame: the language model could not name it otherwise.
    layers["layer_4"] += random.normal(size=VIDEO_SIZE).astype(np.float32)
    audio = {"tokens": random.normal(size=(3, 6, AUDIO_SIZE)).astype(np.float32)}
    changes = {
        "id": f"{task}-{index}",
        "task": task,
        "instruction": "Mask what sounds.",
        "reasoning": "",
        "answer": format_mask_answer([first, second]),
        "masks": refs,
    } | changes
    return Example(sample=sample(index, **changes), features={"video": layers, "audio": audio})
