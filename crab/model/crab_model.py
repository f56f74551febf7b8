"""The model: features and text in, loss out.

A frozen causal LM (plain or wrapped by PEFT), one projector a stream, and the rows of the added
tokens. Any Hugging Face causal LM will do that has a decoder, an input embedding and an lm_head
with nothing after it. Media are put into the prompt with one masked_scatter a stream; lm_head and
cross entropy run only where there is a label (2.1 times faster at 7 % supervised positions, same
loss: reference/performance.md 5.3).

Frozen modules are called, never read: under ZeRO-3 their weights exist only during the call. For
the same reason every forward that may be followed by a backward touches every trained parameter, in
the same order, whatever the batch holds.

Legend: N samples, L sequence, W width of the LLM, V logits (vocabulary and added tokens), M frames
or segments, P encoder tokens, D feature width, S supervised positions.
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
from crab.model.projector import Projector
from crab.model.tokens import NewEmbedding, NewHead, TokenTable

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
        self.new_embedding = NewEmbedding(table, width, std)
        self.new_head = NewHead(table, width, std)
        self.video_ids: Tensor
        self.audio_ids: Tensor
        self.register_buffer("video_ids", torch.tensor(table.video_ids), persistent=False)
        self.register_buffer("audio_ids", torch.tensor(table.audio_ids), persistent=False)

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

    def forward(self, batch: Batch, normalizer: Tensor | float | None = None) -> dict[str, Tensor]:
        """Loss of a batch that has labels (see collate.py for its keys and shapes).

        Args:
            batch: from Collator(..., with_target=True).
            normalizer: what the summed loss is divided by; default: the supervised tokens of this
                batch. Where a global batch is split, pass the global batch's tokens, so that the
                parts' losses add up to the whole; where gradients are then averaged over W ranks
                (DDP, DeepSpeed), pass global tokens / W.

        Returns:
            loss: scalar. sample_loss [N]: cross entropy summed over a sample's tokens, float32,
                detached.
            sample_tokens [N]: supervised tokens of each sample, int64.
        """
        if "labels" not in batch:
            raise ValueError(
                f"batch has keys {sorted(batch)}, a loss needs labels: collate with a target"
            )
        hidden = self.hidden_states(self.embed(batch), batch)
        supervised = batch["labels"][:, 1:] != IGNORED  # position t predicts the token at t + 1
        targets = batch["labels"][:, 1:][supervised]
        logits = self.logits(hidden[:, :-1][supervised])
        # At least float32: sums over a vocabulary are not safe in bfloat16.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        token_loss = F.cross_entropy(logits, targets, reduction="none")
        sample_index = supervised.nonzero()[:, 0]
        sample_tokens = supervised.sum(1)
        sample_loss = token_loss.new_zeros(len(sample_tokens)).index_add(
            0, sample_index, token_loss
        )
        divisor = sample_tokens.sum() if normalizer is None else normalizer
        return {
            "loss": sample_loss.sum() / divisor,
            "sample_loss": sample_loss.detach(),
            "sample_tokens": sample_tokens,
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
        use_cache).
        """
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

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that is trained: adapter, projectors, added tokens."""
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
            idle: Tensor = projector(embeds.new_zeros(1, 1, projector.feature_size))
            return embeds + 0 * idle.sum().to(embeds.dtype)
        vectors: Tensor = projector(features, batch.get(f"{stream}_mask"))
        source = vectors.flatten(0, 1).to(embeds.dtype)
        return embeds.masked_scatter(where.unsqueeze(-1), source)


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
