"""Greedy text, many samples at once.

Greedy only: Crab's release leaves Llama's sampling defaults on, so its scores change from run to
run. The prompt goes through the LLM once, as embeddings; each further step feeds one token a sample
to the key/value cache. Samples that have ended ride along as padding until the last one ends; they
are behind the attention mask of nobody else, so a sample's text does not depend on its neighbours.
The hidden states from which mask tokens were chosen are kept: they prompt the mask decoder, so that
one generation gives the masks of a whole clip.

Legend: N samples, L prompt length, G generated tokens, V logits, W width of the LLM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from crab.model.collate import Batch
from crab.model.crab_model import CrabModel


@dataclass(frozen=True, kw_only=True)
class Generated:
    ids: list[list[int]]
    """One list a sample, without the end token."""
    finished: list[bool]
    """False where max_new_tokens came before the end token."""
    logits: Tensor | None
    """[N, G, V] where they were asked for: what each token was chosen from."""
    drawn: list[Tensor]
    """One tensor a sample, [its tokens <mask_0> ... <mask_5>, W]: what each of them was chosen from, in their order."""


@torch.no_grad()
def generate(
    model: CrabModel, batch: Batch, *, max_new_tokens: int, eos_id: int, return_logits: bool = False
) -> Generated:
    """Continue every prompt of a batch from Collator(..., with_target=False). Leaves the model's
    train/eval mode as it was.

    Raises:
        ValueError: max_new_tokens below 1, a batch with labels, or a prompt padded on the right.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if "labels" in batch:
        raise ValueError(
            "the batch holds answers (labels): collate with with_target=False to generate"
        )
    if not bool(batch["attention_mask"][:, -1].all()):
        raise ValueError(
            "prompts must be padded on the left; the last column of attention_mask has zeros"
        )
    was_training = model.training
    model.eval()
    try:
        return _generate(model, batch, max_new_tokens, eos_id, return_logits)
    finally:
        model.train(was_training)


def _generate(
    model: CrabModel, batch: Batch, max_new_tokens: int, eos_id: int, return_logits: bool
) -> Generated:
    embeds = model.embed(batch)
    num_samples, prompt_length = batch["input_ids"].shape
    cache = DynamicCache(config=model.base.config)
    # Zeros of the prompt's padding, then ones: cut to the present length at each step.
    mask = torch.cat(
        [batch["attention_mask"], batch["attention_mask"].new_ones(num_samples, max_new_tokens)],
        dim=1,
    )
    positions = batch["position_ids"]
    done = torch.zeros(num_samples, dtype=torch.bool, device=mask.device)
    tokens, all_logits = [], []
    drawn: list[list[Tensor]] = [[] for _ in range(num_samples)]
    for step in range(max_new_tokens):
        view = {"attention_mask": mask[:, : prompt_length + step], "position_ids": positions}
        hidden = model.hidden_states(embeds, view, past_key_values=cache, use_cache=True)
        logits = model.logits(hidden[:, -1])
        token = logits.argmax(-1).masked_fill(done, eos_id)
        tokens.append(token)
        if return_logits:
            all_logits.append(logits)
        for sample in torch.isin(token, model.drawn_ids).nonzero()[:, 0].tolist():
            drawn[sample].append(hidden[sample, -1])
        done = done | (token == eos_id)
        if bool(done.all()):
            break
        embeds = model.embed({"input_ids": token.unsqueeze(1)})
        positions = positions[:, -1:] + 1
    rows = torch.stack(tokens, dim=1).tolist()
    return Generated(
        ids=[row[: row.index(eos_id)] if eos_id in row else row for row in rows],
        finished=done.tolist(),
        logits=torch.stack(all_logits, dim=1) if return_logits else None,
        drawn=[torch.stack(s) if s else hidden.new_zeros(0, hidden.shape[-1]) for s in drawn],
    )
