"""What defines a Crab model: one frozen record, and two presets as functions.

Everything here changes what the model computes; nothing here says where it runs. The resolved
record is saved beside the trained weights (see artifact.py), so a folder can be loaded without the
spec that made it. Pydantic, because the records come from YAML and unknown keys must be refused.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crab.tasks.mask_answer import NUM_MASK_TOKENS

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LlmConfig(_Record):
    """The frozen language model: a folder with weights, or an architecture filled with seeded
    random numbers.
    """

    path: str | None = None
    """Folder with config.json, *.safetensors and the tokenizer (or a name in the local Hugging Face
    cache).
    """
    architecture: dict[str, Any] | None = None
    """A Hugging Face config as a mapping, with `model_type`. Used when there is no path."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError(
                f"llm: give either path or architecture, got path={self.path!r} and "
                f"architecture={'set' if self.architecture else self.architecture!r}"
            )
        if self.architecture is not None and "model_type" not in self.architecture:
            raise ValueError(
                "llm.architecture needs 'model_type' (for example 'llama'), got keys "
                f"{sorted(self.architecture)}"
            )
        return self


class ProjectorConfig(_Record):
    """A Q-Former and a two-layer MLP, from encoder features to the width of the LLM."""

    layer: str
    """Which of the encoder's outputs feeds the LLM, for example 'layer_23' or 'tokens'."""
    feature_size: int = Field(gt=0)
    num_queries: int = Field(default=32, gt=0)
    """Vectors handed to the LLM for one frame or one audio segment."""
    hidden_size: int = Field(default=768, gt=0)
    num_heads: int = Field(default=12, gt=0)
    num_layers: int = Field(default=2, gt=0)
    intermediate_size: int = Field(default=3072, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Inside the Q-Former, on attention and hidden states; 0.1 is what a BERT configuration carries
    into Crab.
    """

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"projector: hidden_size {self.hidden_size} is not a multiple of num_heads "
                f"{self.num_heads}"
            )
        return self


class MaskDecoderConfig(_Record):
    """Mask tokens to masks, on two scales of the visual encoder (see mask_decoder.py). The defaults are Crab's."""

    layers: tuple[str, str]
    """The visual encoder's outputs that are drawn on: (coarse, fine), for example ('layer_14', 'layer_22')."""
    feature_size: int = Field(gt=0)
    width: int = Field(default=256, gt=0)
    map_width: int = Field(default=32, gt=0)
    """Channels of a place where its features meet the queries, and of the hidden maps. Crab has an eighth of `width`,
    which is 32 as well, and would be 8 at the tiny sizes: fewer than AV-Shapes' 13 classes.
    """
    num_queries: int = Field(default=300, gt=0)
    """Learned vectors of the query generator; each of them gives one map a scale."""
    num_heads: int = Field(default=8, gt=0)
    intermediate_size: int = Field(default=2048, gt=0)
    num_layers: int = Field(default=2, gt=0)
    """Of the two-way transformer."""
    num_query_layers: int = Field(default=2, gt=0)
    """Of the query generator."""
    tokens_per_scale: int = Field(default=3, gt=0)
    output_size: int = Field(default=112, gt=0)
    """Side of the drawn masks in pixels; answers are resized from it to 224 x 224."""
    num_classes: int = Field(default=71, gt=1)
    """Of semantic masks, background (class 0) included."""
    weight: float = Field(default=1.0, ge=0)
    """Of the mask loss beside the text loss."""
    bce_weight: float = Field(default=1.0, ge=0)
    dice_weight: float = Field(default=0.5, ge=0)
    ce_weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # The two-way transformer's cross attention runs at half the width.
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"masks: width {self.width} must be a multiple of twice num_heads {self.num_heads}"
            )
        if len(self.layers) * self.tokens_per_scale != NUM_MASK_TOKENS:
            raise ValueError(
                f"masks: {len(self.layers)} scales x {self.tokens_per_scale} tokens are not the "
                f"{NUM_MASK_TOKENS} mask tokens of the grammar"
            )
        return self


class AdapterConfig(_Record):
    """The adapter on the LLM's linear layers. `lora` is PEFT's own, kept as the baseline of equal
    rank.
    """

    method: Literal["interaction_lora", "lora", "none"] = "interaction_lora"
    num_heads: int = Field(default=3, gt=0)
    r: int = Field(default=8, gt=0)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    router_temperature: float = Field(default=1.0, gt=0)
    target_modules: tuple[str, ...] = ALL_LINEAR


class PromptConfig(_Record):
    system: str = "You are a helpful assistant."
    """Used only where the tokenizer brings a chat template; the plain template has no system
    text.
    """
    include_reasoning: bool = True
    """Train on reasoning and answer; False trains on the answer alone."""
    max_length: int = Field(default=4096, gt=0)
    """Longest sequence in tokens, media included. A longer sample is refused by name, never cut."""


class CrabConfig(_Record):
    llm: LlmConfig
    video: ProjectorConfig
    audio: ProjectorConfig
    adapter: AdapterConfig = AdapterConfig()
    prompt: PromptConfig = PromptConfig()
    time_positions: int = Field(default=0, ge=0)
    """So many frames or segments of a clip have a learned vector of their time, added to what the projector says of it.
    0 is Crab's own: time is known through the LLM's positions alone, which a small LLM takes long to learn to count.
    """
    masks: MaskDecoderConfig | None = None
    """None: a model that draws no masks; samples with mask tokens are then learnt as text alone."""
    seed: int = Field(default=42, ge=0)
    """Initial values of adapter, projectors, mask decoder, and of the LLM when it is made from an architecture."""
    initial: str | None = None
    """Folder with `initial.safetensors` and its digest (see initial.py): first values of projectors, mask decoder and
    added tokens, from an earlier training. A saved adapter holds its own values and does not need the folder again.
    """

    @model_validator(mode="after")
    def _one_visual_encoder(self) -> Self:
        if self.masks is not None and self.masks.feature_size != self.video.feature_size:
            raise ValueError(
                f"masks.feature_size {self.masks.feature_size} is not video.feature_size "
                f"{self.video.feature_size}, and both read the same encoder"
            )
        return self

    def layers(self, stream: str, *, masks: bool = True) -> tuple[str, ...]:
        """The encoder outputs that the model reads of 'video', 'image' or 'audio'; `masks`: also those for drawing."""
        if stream == "audio":
            return (self.audio.layer,)
        drawn = self.masks.layers if masks and self.masks is not None else ()
        return tuple(dict.fromkeys((self.video.layer, *drawn)))


def paper(llm_path: str | None = None) -> CrabConfig:
    """Crab's own sizes (arXiv 2503.13068): CLIP ViT-L/14 layer 23, BEATs tokens, Llama-2-7B-chat, 3
    heads of rank 8.

    Without `llm_path` the LLM is the same architecture with random weights: for shapes and counts
    only.
    """
    llama_2_7b = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return CrabConfig(
        llm=LlmConfig(path=llm_path) if llm_path else LlmConfig(architecture=llama_2_7b),
        video=ProjectorConfig(layer="layer_23", feature_size=1024),
        audio=ProjectorConfig(layer="tokens", feature_size=768),
        masks=MaskDecoderConfig(layers=("layer_14", "layer_22"), feature_size=1024),
    )


def tiny(
    llm_path: str | None = None,
    *,
    vocab_size: int = 1024,
    video_layer: str = "layer_4",
    video_size: int = 96,
    mask_layers: tuple[str, str] = ("layer_2", "layer_4"),
    audio_layer: str = "tokens",
    audio_size: int = 96,
    initial: str | None = None,
) -> CrabConfig:
    """A whole Crab of about three million parameters that trains on one CPU core.

    Six vectors a frame (AV-Shapes has six places) and four a segment: 10 frames and 10 segments are 100 positions, so
    that text and media weigh about the same. No dropout, so that runs compare exactly.
    """
    projector: dict[str, Any] = {
        "hidden_size": 128,
        "num_heads": 4,
        "num_layers": 2,
        "intermediate_size": 256,
        "dropout": 0.0,
    }
    return CrabConfig(
        llm=LlmConfig(path=llm_path)
        if llm_path
        else LlmConfig(architecture=tiny_llama_architecture(vocab_size)),
        video=ProjectorConfig(
            layer=video_layer, feature_size=video_size, num_queries=6, **projector
        ),
        audio=ProjectorConfig(
            layer=audio_layer, feature_size=audio_size, num_queries=4, **projector
        ),
        masks=MaskDecoderConfig(
            layers=mask_layers,
            feature_size=video_size,
            width=64,
            num_queries=16,
            num_heads=4,
            intermediate_size=128,
            output_size=56,
            num_classes=13,
        ),
        time_positions=16,
        adapter=AdapterConfig(lora_dropout=0.0),
        prompt=PromptConfig(max_length=1024),
        initial=initial,
    )


def tiny_llama_architecture(vocab_size: int) -> dict[str, Any]:
    """A Llama of 2 M parameters: four layers of width 192, tied embeddings."""
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        # Wide enough for attention to differ between tokens at once, and slow rotations, so that contents can be
        # compared across a whole prompt: with the defaults (0.02, 1e4) small models learn to look things up much later.
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
