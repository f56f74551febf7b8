"""The model: features and text in, loss out.

A frozen causal LM (plain or wrapped by PEFT), one projector a stream, the rows of the added tokens,
and a mask decoder where the config has one. Any Hugging Face causal LM will do that has a decoder,
an input embedding and an lm_head with nothing after it. Media are put into the prompt with one
masked_scatter a stream; lm_head and cross entropy run only where there is a label (2.1 times faster
at 7 % supervised positions, same loss: reference/performance.md 5.3). The hidden states that
predict mask tokens prompt the mask decoder, in training as in generation.

Frozen modules are called, never read: under ZeRO-3 their weights exist only during the call. For
the same reason every forward that may be followed by a backward touches every trained parameter, in
the same order, whatever the batch holds.

Legend: N samples, L sequence, W width of the LLM, V logits (vocabulary and added tokens), M frames
or segments, P encoder tokens, D feature width, S supervised positions, G groups of mask tokens, F
frames with a true mask.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from crab.model.collate import IGNORED, Batch
from crab.model.config import CrabConfig
from crab.model.mask_decoder import MaskDecoder
from crab.model.mask_loss import mask_loss
from crab.model.packed import packed_hidden_states
from crab.model.projector import Projector
from crab.model.sequences import num_samples, ranks_within_samples, sample_numbers
from crab.model.tokens import NewEmbedding, NewHead, TokenTable
from crab.tasks.mask_answer import NUM_MASK_TOKENS

# Models that change the logits after lm_head; leaving that out would be silently wrong.
_AFTER_HEAD = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


class CrabModel(nn.Module):
    def __init__(
        self, llm: PreTrainedModel | PeftModel, config: CrabConfig, table: TokenTable
    ) -> None:
        """Wrap `llm`. One that PEFT has not wrapped is frozen here; PEFT freezes its own.

        The caller seeds torch before (build.py does); the added tokens need no seed.
        """
        super().__init__()
        if not isinstance(llm, PeftModel):
            llm.requires_grad_(False)
        self.config = config
        self.table = table
        self.llm = llm
        text_config = _checked_text_config(self.base)
        width = int(text_config.hidden_size)
        std = float(getattr(text_config, "initializer_range", 0.02))
        self.video_projector = Projector(config.video, width)
        self.audio_projector = Projector(config.audio, width)
        self.time_embedding = (
            nn.Embedding(config.time_positions, width) if config.time_positions else None
        )
        self.new_embedding = NewEmbedding(table, width, std)
        self.new_head = NewHead(table, width, std)
        self.mask_decoder = None if config.masks is None else MaskDecoder(config.masks, width)
        self.video_ids: Tensor
        self.audio_ids: Tensor
        self.drawn_ids: Tensor
        self.register_buffer("video_ids", torch.tensor(table.video_ids), persistent=False)
        self.register_buffer("audio_ids", torch.tensor(table.audio_ids), persistent=False)
        self.register_buffer("drawn_ids", torch.tensor(table.drawn_ids), persistent=False)

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM without PEFT's wrapper; its linear layers are still the adapted ones."""
        if isinstance(self.llm, PeftModel):
            return cast(PreTrainedModel, self.llm.get_base_model())
        return self.llm

    @property
    def decoder(self) -> nn.Module:
        """The LLM without its head: embeddings in, last hidden states out."""
        decoder: nn.Module = getattr(self.base, self.base.base_model_prefix)
        return decoder

    def forward(
        self,
        batch: Batch,
        normalizer: Tensor | float | None = None,
        mask_normalizer: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a batch that has labels (see collate.py for its keys and shapes).

        Args:
            batch: from Collator(..., with_target=True).
            normalizer: what the summed loss is divided by; default: the supervised tokens of this
                batch. Where a global batch is split, pass the global batch's tokens, so that the
                parts' losses add up to the whole; where gradients are then averaged over W ranks
                (DDP, DeepSpeed), pass global tokens / W.
            mask_normalizer: the same for the mask loss; its unit is the labelled frame. May be 0 where no sample of the
                global batch has one.

        Returns:
            loss: scalar, text + masks.weight x masks. sample_loss [N]: cross entropy summed over a
                sample's tokens, float32, detached.
            sample_tokens [N]: supervised tokens of each sample, int64.
            sample_mask_loss [N]: mask loss summed over a sample's labelled frames, float32, detached, not weighted.
            sample_mask_frames [N]: labelled frames of each sample, int64.
        """
        if "labels" not in batch:
            raise ValueError(
                f"batch has keys {sorted(batch)}, a loss needs labels: collate with a target"
            )
        hidden = self.hidden_states(self.embed(batch), batch)
        supervised = batch["labels"][:, 1:] != IGNORED  # position t predicts the token at t + 1
        targets = batch["labels"][:, 1:][supervised]
        predicting = hidden[:, :-1][supervised]
        logits = self.logits(predicting)
        # At least float32: sums over a vocabulary are not safe in bfloat16.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        token_loss = F.cross_entropy(logits, targets, reduction="none")
        sample_index = sample_numbers(batch)[:, 1:][supervised]
        sample_tokens = sample_index.new_zeros(num_samples(batch)).index_add(
            0, sample_index, torch.ones_like(sample_index)
        )
        sample_loss = token_loss.new_zeros(len(sample_tokens)).index_add(
            0, sample_index, token_loss
        )
        loss = sample_loss.sum() / (sample_tokens.sum() if normalizer is None else normalizer)
        sample_mask_frames = torch.zeros_like(sample_tokens)
        sample_mask_loss = torch.zeros_like(sample_loss)
        if self.config.masks is not None and self.mask_decoder is not None:
            drawn = predicting[torch.isin(targets, self.drawn_ids)]
            sample_mask_loss = self._mask_loss(drawn, batch, len(sample_tokens)).to(loss.dtype)
            if "mask_sample" in batch:
                frames = batch["mask_sample"]
                sample_mask_frames = sample_mask_frames.index_add(
                    0, frames, torch.ones_like(frames)
                )
            divisor = sample_mask_frames.sum() if mask_normalizer is None else mask_normalizer
            # Without a frame the sum is 0 as well.
            divisor = torch.as_tensor(divisor, device=loss.device, dtype=loss.dtype)
            divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
            loss = loss + self.config.masks.weight * sample_mask_loss.sum() / divisor
        return {
            "loss": loss,
            "sample_loss": sample_loss.detach(),
            "sample_tokens": sample_tokens,
            "sample_mask_loss": sample_mask_loss.detach(),
            "sample_mask_frames": sample_mask_frames,
        }

    def embed(self, batch: Batch) -> Tensor:
        """Text embeddings with the media put in, [N, L, W].

        Raises:
            ValueError: placeholders and projected vectors differ in number (collator and model
                disagree).
        """
        input_ids = batch["input_ids"]
        # The frozen embedding may have no row for our tokens: it gets id 0 there, and the result is
        # replaced.
        known = input_ids.masked_fill(self.new_embedding.is_new(input_ids), 0)
        embeds = self.new_embedding(input_ids, self.base.get_input_embeddings()(known))
        embeds = self._splice(
            embeds, input_ids, self.video_ids, self.video_projector, batch, "video"
        )
        return self._splice(embeds, input_ids, self.audio_ids, self.audio_projector, batch, "audio")

    def hidden_states(self, embeds: Tensor, batch: Batch, **cache: Any) -> Tensor:
        """Last hidden states [N, L, W]. `cache` goes to the decoder (past_key_values,
        use_cache). Of a packed batch [1, L, W], each sample as if it were alone.
        """
        if "lengths" in batch:
            return packed_hidden_states(
                self.base, self.decoder, embeds, batch["position_ids"], batch["lengths"]
            )
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            **({"use_cache": False} | cache),
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., W] -> [..., V]; -inf for media tokens, which are never generated."""
        logits: Tensor = self.new_head(hidden, self.base.get_output_embeddings()(hidden))
        return logits

    def draw(self, prompts: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Masks of the frames in a batch's mask_coarse, mask_fine and mask_group, as its prompts ask.

        Args:
            prompts: [G, 6, W], the hidden states that predict a group's <mask_0> ... <mask_5>.

        Returns:
            Logits of the binary mask [F, S, S] and of the classes [F, C, S, S].

        Raises:
            ValueError: the model has no mask decoder.
        """
        if self.config.masks is None or self.mask_decoder is None:
            raise ValueError("this model draws no masks; set config.masks and train it again")
        coarse, fine = self.config.masks.layers
        features = {coarse: batch["mask_coarse"], fine: batch["mask_fine"]}
        binary, classes = self.mask_decoder(prompts, features, batch["mask_group"])
        return binary, classes

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained: adapter, projectors, mask decoder, added tokens."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Copies of the trained parameters on the CPU. Under ZeRO-3 gather `trainable_parameters()`
        around the call.

        Raises:
            ValueError: a parameter is empty, as ZeRO-3's ungathered ones are.
        """
        state = {n: p.detach().cpu().clone() for n, p in self.trainable_parameters().items()}
        empty = [name for name, tensor in state.items() if tensor.numel() == 0]
        if empty:
            raise ValueError(
                f"{len(empty)} trained parameters are empty, first {empty[0]!r}; "
                "gather them before saving"
            )
        return state

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the trained parameters. All or nothing.

        Raises:
            ValueError: names missing or unexpected, or shapes that differ; names them.
        """
        own = self.trainable_parameters()
        problems = _difference("missing", own.keys() - state.keys())
        problems += _difference("unexpected", state.keys() - own.keys())
        problems += [
            f"{name} is {tuple(state[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ][:5]
        if problems:
            raise ValueError(
                "the weights do not fit this model: "
                + "; ".join(problems)
                + ". Build the model from the config that was saved with them"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def _mask_loss(self, drawn: Tensor, batch: Batch, num_samples: int) -> Tensor:
        """drawn: hidden states [G * 6, W] that predict mask tokens, row by row -> loss summed by sample [N]."""
        masks, decoder = self.config.masks, self.mask_decoder
        assert masks is not None
        assert decoder is not None
        if "mask_group" not in batch:
            zero = drawn.new_zeros(
                num_samples, dtype=torch.promote_types(drawn.dtype, torch.float32)
            )
            if not torch.is_grad_enabled():
                return zero
            # As in _splice: another rank may have masks to draw, and both must run the decoder.
            blank = _blank_frame(drawn, masks.feature_size)
            # With a gradient, as real prompts have one: ZeRO-3 lets go of a module's weights when the backward reaches
            # its inputs, and on a rank that keeps them the next gather has another size.
            prompts = drawn.new_zeros(1, NUM_MASK_TOKENS, drawn.shape[1]).requires_grad_()
            binary, classes = self.draw(prompts, blank)
            return zero + 0 * (binary.sum() + classes.sum()).to(zero.dtype)
        groups = batch["mask_group"]
        if len(drawn) % NUM_MASK_TOKENS or int(groups.max()) >= len(drawn) // NUM_MASK_TOKENS:
            raise ValueError(
                f"the labels hold {len(drawn)} mask tokens, the frames name group {int(groups.max())} of "
                f"{NUM_MASK_TOKENS} each; collate with this model's tokens"
            )
        binary, classes = self.draw(drawn.unflatten(0, (-1, NUM_MASK_TOKENS)), batch)
        return mask_loss(
            binary,
            classes,
            batch["mask_target"],
            batch["mask_semantic"],
            batch["mask_sample"],
            num_samples,
            masks,
        )

    def _splice(
        self,
        embeds: Tensor,
        input_ids: Tensor,
        placeholder_ids: Tensor,
        projector: Projector,
        batch: Batch,
        stream: str,
    ) -> Tensor:
        features = batch.get(stream)
        where = torch.isin(input_ids, placeholder_ids)
        expected = 0 if features is None else features.shape[0] * projector.num_queries
        found = int(where.sum())
        if found != expected:
            raise ValueError(
                f"{stream}: the batch has {found} placeholders, its features give {expected} "
                f"vectors ({projector.num_queries} for each frame or segment); collate with this "
                "model's config"
            )
        if features is None:
            if not torch.is_grad_enabled():
                return embeds
            # Another rank may hold media while this one does not: both must run the projector and
            # reduce its gradients.
            idle: Tensor = projector(embeds.new_zeros(1, 1, projector.feature_size)).sum()
            if self.time_embedding is not None:
                idle = idle + self.time_embedding(input_ids.new_zeros(1)).sum()
            return embeds + 0 * idle.to(embeds.dtype)
        vectors: Tensor = projector(features, batch.get(f"{stream}_mask"))
        source = vectors.flatten(0, 1)
        if self.time_embedding is not None:
            source = source + self.time_embedding(
                self._times(where, projector.num_queries, batch, stream)
            )
        source = source.to(embeds.dtype)
        return embeds.masked_scatter(where.unsqueeze(-1), source)

    def _times(self, where: Tensor, num_queries: int, batch: Batch, stream: str) -> Tensor:
        """Number of the frame or segment within its sample, for each placeholder in the order of `where` [N, L]."""
        times = (ranks_within_samples(where, batch) // num_queries)[where]
        if times.numel() and int(times.max()) >= self.config.time_positions:
            raise ValueError(
                f"{stream}: a sample has {int(times.max()) + 1} frames or segments, time_positions is "
                f"{self.config.time_positions}; sample fewer, or raise it and train anew"
            )
        return times


def _blank_frame(like: Tensor, feature_size: int) -> Batch:
    """The smallest frame that can be drawn on: 2 x 2 encoder tokens."""
    blank = like.new_zeros(1, 4, feature_size)
    group = torch.zeros(1, dtype=torch.int64, device=like.device)
    return {"mask_coarse": blank, "mask_fine": blank, "mask_group": group}


def _checked_text_config(base: PreTrainedModel) -> Any:
    config = base.config.get_text_config()
    if base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        raise ValueError(
            f"{type(base).__name__} is not a causal LM with an lm_head; choose another llm"
        )
    for field, neutral in _AFTER_HEAD.items():
        if getattr(config, field, None) not in (None, neutral):
            raise ValueError(
                f"{type(base).__name__} changes its logits after lm_head "
                f"({field}={getattr(config, field)}), which "
                "Crab's loss would leave out; choose another llm"
            )
    return config


def _difference(word: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    if not listed:
        return []
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return [f"{len(listed)} {word}: {', '.join(listed[:5])}{more}"]
