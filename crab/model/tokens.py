"""The tokens that Crab adds to a language model, with small trainable rows of their own.

The LLM's embedding matrix and lm_head stay frozen and are not resized. Crab's release resizes them,
trains the new rows in some stages and saves them in none, so that training and inference see
different random vectors. Here the rows are two small parameters (`rows` of NewEmbedding and of
NewHead) that are saved with the adapter, and their first values depend on the token's name alone:
no random state, no order of construction.

Both modules take the result of the frozen module as an argument and never touch its weight: under
ZeRO-3 a frozen weight exists only while its own module runs.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from crab.tasks.mask_answer import NUM_MASK_TOKENS

MEDIA_TOKENS = tuple(
    f"<{media}{part}>" for media in ("image", "video", "audio") for part in ("", "_start", "_end")
)
DRAWN_TOKENS = tuple(f"<mask_{index}>" for index in range(NUM_MASK_TOKENS))
"""The hidden states that predict these, in this order, prompt the mask decoder."""
MASK_TOKENS = ("<mask_start>", "<mask_end>", *DRAWN_TOKENS)
NEW_TOKENS = MEDIA_TOKENS + MASK_TOKENS
GENERATED_TOKENS = MASK_TOKENS
"""Only these can be written by the model; the media tokens occur in prompts alone and never get a
logit.
"""


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """Names and ids of the added tokens, in the order of their trainable rows."""

    names: tuple[str, ...]
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids) or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"every added token needs an id of its own, got {self.names} and {self.ids}"
            )
        missing = [name for name in NEW_TOKENS if name not in self.names]
        if missing:
            raise ValueError(
                f"token table lacks {missing}; build it with add_new_tokens(tokenizer)"
            )

    @cached_property
    def id_of(self) -> dict[str, int]:
        return dict(zip(self.names, self.ids, strict=True))

    @property
    def video_ids(self) -> tuple[int, int]:
        """Placeholders that the visual projector fills: frames of a video, and still images."""
        return self.id_of["<video>"], self.id_of["<image>"]

    @property
    def audio_ids(self) -> tuple[int]:
        return (self.id_of["<audio>"],)

    @property
    def drawn_ids(self) -> tuple[int, ...]:
        """<mask_0> ... <mask_5>."""
        return tuple(self.id_of[name] for name in DRAWN_TOKENS)


def add_new_tokens(tokenizer: PreTrainedTokenizerBase) -> TokenTable:
    """Make the tokenizer know Crab's tokens (in place) and return their ids.

    A name that the tokenizer already knows keeps its id. The others follow the tokenizer's last id;
    in an LLM whose embedding matrix is padded beyond its tokenizer (Qwen2, for example) these ids
    fall on unused rows, which NewEmbedding and NewHead replace. Running it twice changes nothing.

    Raises:
        ValueError: the tokenizer handed out an id that another of its tokens has.
    """
    before = tokenizer.get_vocab()
    taken = {token_id: name for name, token_id in before.items()}
    for name in NEW_TOKENS:
        if name not in before:
            # What is written is part of the answer and must survive decoding without special tokens.
            special = name not in GENERATED_TOKENS
            tokenizer.add_tokens(
                [AddedToken(name, special=special, normalized=False)], special_tokens=special
            )
    vocabulary = tokenizer.get_vocab()
    ids = tuple(vocabulary[name] for name in NEW_TOKENS)
    for name, token_id in zip(NEW_TOKENS, ids, strict=True):
        if taken.get(token_id, name) != name:
            raise ValueError(
                f"tokenizer gave {name!r} the id {token_id}, which is {taken[token_id]!r}: its "
                "vocabulary has holes. Add filler tokens up to the highest id first"
            )
    return TokenTable(names=NEW_TOKENS, ids=ids)


def initial_rows(names: tuple[str, ...], width: int, std: float, kind: str) -> Tensor:
    """Rows ~ N(0, std), shape [len(names), width], each a function of its name and `kind` alone."""
    rows = []
    for name in names:
        digest = hashlib.sha256(f"crab new token 1 {kind} {name}".encode()).digest()
        rows.append(
            np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16]))).normal(
                0, std, width
            )
        )
    # Made on the CPU, then moved to wherever modules are being built at the moment (the meta device
    # in tests).
    return torch.from_numpy(np.stack(rows).astype(np.float32)).to(torch.empty(0).device)


class NewEmbedding(nn.Module):
    """Input rows of the added tokens. `rows` is [number of tokens, LLM width]."""

    def __init__(self, table: TokenTable, width: int, std: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(initial_rows(table.names, width, std, "embedding"))
        lookup = torch.full((max(table.ids) + 1,), -1)
        lookup[torch.tensor(table.ids, device=lookup.device)] = torch.arange(len(table.ids))
        self.row_of_id: Tensor
        self.register_buffer("row_of_id", lookup, persistent=False)

    def is_new(self, input_ids: Tensor) -> Tensor:
        """bool, shape of input_ids: True where the token is one of ours."""
        return self._row(input_ids) >= 0

    def forward(self, input_ids: Tensor, base_embeds: Tensor) -> Tensor:
        """[N, L] ids and the frozen embeddings [N, L, width] -> [N, L, width] with our rows put
        in.
        """
        row = self._row(input_ids)
        ours = F.embedding(row.clamp(min=0), self.rows)
        return torch.where((row >= 0).unsqueeze(-1), ours.to(base_embeds.dtype), base_embeds)

    def _row(self, input_ids: Tensor) -> Tensor:
        last = self.row_of_id.shape[0] - 1
        return torch.where(input_ids <= last, self.row_of_id[input_ids.clamp(max=last)], -1)


class NewHead(nn.Module):
    """Output rows of the tokens that can be generated. `rows` is [len(GENERATED_TOKENS), LLM
    width].
    """

    def __init__(self, table: TokenTable, width: int, std: float) -> None:
        super().__init__()
        self.rows = nn.Parameter(initial_rows(GENERATED_TOKENS, width, std, "head"))
        generated = [table.id_of[name] for name in GENERATED_TOKENS]
        prompt_only = [token_id for token_id in table.ids if token_id not in set(generated)]
        self.min_width = max(table.ids) + 1
        self.generated_ids: Tensor
        self.prompt_only_ids: Tensor
        self.register_buffer("generated_ids", torch.tensor(generated), persistent=False)
        self.register_buffer("prompt_only_ids", torch.tensor(prompt_only), persistent=False)

    def forward(self, hidden: Tensor, base_logits: Tensor) -> Tensor:
        """Hidden states [..., width] and frozen logits [..., V] -> logits [..., max(V, highest id +
        1)].

        Ids that no token has, and tokens of the prompt, get -inf: they cannot be generated and take
        no probability.
        """
        pad = max(0, self.min_width - base_logits.shape[-1])
        logits = F.pad(base_logits, (0, pad), value=float("-inf"))
        logits = logits.index_fill(-1, self.prompt_only_ids, float("-inf"))
        ours = F.linear(hidden, self.rows.to(hidden.dtype)).to(logits.dtype)
        return logits.index_copy(-1, self.generated_ids, ours)
