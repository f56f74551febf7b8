"""The paper preset at its full size, on the meta device: every adapted layer by name and shape, and what is counted.

Nothing here takes memory: a meta tensor has a shape and no elements. Sizes are those of reference/crab.md 2.1.
"""

from __future__ import annotations

import pytest
import tiny_crab
import torch
from torch import nn

from crab.model.build import build_model
from crab.model.config import AdapterConfig, paper
from crab.model.crab_model import CrabModel

LAYERS, WIDTH, INNER, VOCABULARY = 32, 4096, 11008, 32000
HEADS, RANK = 3, 8

# Of one layer: name -> (in, out) of the frozen linear.
TARGETS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, INNER),
    "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}


def on_meta(adapter: AdapterConfig | None = None) -> CrabModel:
    config = paper()
    if adapter is not None:
        config = config.model_copy(update={"adapter": adapter})
    with torch.device("meta"):
        return build_model(config, tiny_crab.tokenizer())


@pytest.fixture(scope="module")
def model() -> CrabModel:
    return on_meta()


def shapes(parameters: dict[str, nn.Parameter], prefix: str) -> dict[str, tuple[int, ...]]:
    """Those whose name starts with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tuple(parameter.shape)
        for name, parameter in parameters.items()
        if name.startswith(prefix)
    }


def total(parameters: dict[str, nn.Parameter], prefix: str) -> int:
    return sum(p.numel() for name, p in parameters.items() if name.startswith(prefix))


def test_no_tensor_of_it_has_memory(model: CrabModel) -> None:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert [name for name, tensor in tensors.items() if not tensor.is_meta] == []


def test_every_adapted_layer_by_name_and_shape(model: CrabModel) -> None:
    want = {}
    for layer in range(LAYERS):
        for target, (inputs, outputs) in TARGETS.items():
            place = f"{layer}.{target}.ilora_heads.default."
            want[f"{place}weight_ar"] = (RANK + HEADS, inputs)  # A on top, the router below
            want[f"{place}weight_b"] = (outputs, HEADS * RANK)  # the heads side by side
    trained = model.trainable_parameters()
    assert shapes(trained, "llm.base_model.model.model.layers.") == want
    assert len(want) == 448
    assert total(trained, "llm.") == total(trained, "llm.base_model.model.model.layers.")


def test_the_frozen_model_is_llama_2_7b(model: CrabModel) -> None:
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    want = {
        "embed_tokens.weight": (VOCABULARY, WIDTH),
        "norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        for target, (inputs, outputs) in TARGETS.items():
            want[f"layers.{layer}.{target}.base_layer.weight"] = (outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            want[f"layers.{layer}.{norm}.weight"] = (WIDTH,)
    assert shapes(frozen, "llm.base_model.model.model.") == want
    assert shapes(frozen, "llm.base_model.model.lm_head.") == {"weight": (VOCABULARY, WIDTH)}
    assert total(frozen, "") == 6_738_415_616


def test_trained_counts(model: CrabModel) -> None:
    trained = model.trainable_parameters()
    ar = [p for name, p in trained.items() if name.endswith("weight_ar")]
    b = [p for name, p in trained.items() if name.endswith("weight_b")]
    assert sum(p[:RANK].numel() for p in ar) == 9_109_504
    assert sum(p[RANK:].numel() for p in ar) == 3_416_064
    assert sum(p.numel() for p in b) == 32_636_928
    assert total(trained, "llm.") == 45_162_496
    parts = (
        "video_projector.",
        "audio_projector.",
        "mask_decoder.",
        "new_embedding.",
        "new_head.",
    )
    assert [total(trained, part) for part in parts] == [
        39_649_280,
        38_862_336,
        30_397_968,
        17 * WIDTH,
        8 * WIDTH,
    ]
    assert total(trained, "") == 154_174_480


def test_shapes_of_what_joins_the_parts(model: CrabModel) -> None:
    trained = model.trainable_parameters()
    projector = {
        "queries": (1, 32, 768),
        "mlp.0.weight": (WIDTH, 768),
        "mlp.0.bias": (WIDTH,),
        "mlp.2.weight": (WIDTH, WIDTH),
        "mlp.2.bias": (WIDTH,),
    }
    for stream, feature_size in (("video", 1024), ("audio", 768)):
        got = shapes(trained, f"{stream}_projector.")
        want = projector | {
            "input_norm.weight": (feature_size,),
            "qformer.encoder.layer.1.crossattention.attention.key.weight": (768, feature_size),
        }
        assert {name: got[name] for name in want} == want
    assert trained["new_embedding.rows"].shape == (17, WIDTH)
    assert trained["new_head.rows"].shape == (8, WIDTH)
    drawing = shapes(trained, "mask_decoder.")
    assert drawing["prompt_mlp.0.weight"] == (WIDTH, WIDTH)
    assert drawing["coarse.neck.0.weight"] == (256, 1024, 1, 1)
    assert drawing["class_head.weight"] == (71, 32, 1, 1)


@pytest.mark.parametrize(
    ("adapter", "numel"),
    [
        (AdapterConfig(num_heads=1), 21_127_168),
        (AdapterConfig(num_heads=5), 69_197_824),
        (AdapterConfig(method="lora", r=8), 19_988_480),
        (AdapterConfig(method="lora", r=18), 44_974_080),  # the nearest to three heads of rank 8
        (AdapterConfig(method="none"), 0),
    ],
)
def test_counts_of_other_adapters(adapter: AdapterConfig, numel: int) -> None:
    assert total(on_meta(adapter).trainable_parameters(), "llm.") == numel
