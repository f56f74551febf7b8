"""Q-Former projector: what an encoder says of one frame or one audio segment, in a few LLM-wide
vectors.

The Q-Former is transformers' (BLIP-2's, without text, cross-attention in every layer), because it
is the same network that Crab uses (`VLProjector`, `ALProjector`) and is kept up by others; ours are
the LayerNorm before it, the learned queries and the MLP after it. It runs once per frame on the one
selected encoder layer; Crab's release runs it on three and keeps the last.

Legend: M frames or segments, P encoder tokens in each, D their width, Q queries, W width of the
LLM.
"""

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from crab.model.config import ProjectorConfig

QUERY_STD = 0.02  # as in Crab: visual_query_tokens ~ N(0, 0.02)


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, llm_width: int) -> None:
        super().__init__()
        self.feature_size = config.feature_size
        self.num_queries = config.num_queries
        self.input_norm = nn.LayerNorm(config.feature_size)
        self.queries = nn.Parameter(
            torch.randn(1, config.num_queries, config.hidden_size) * QUERY_STD
        )
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                cross_attention_frequency=1,
                encoder_hidden_size=config.feature_size,
                use_qformer_text_input=False,
            )
        )
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_size, llm_width),
            nn.GELU(),
            nn.Linear(llm_width, llm_width),
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """features [M, P, D] of any float type, mask [M, P] (True = a real token) or None -> [M, Q,
        W].
        """
        features = self.input_norm(features.to(self.queries.dtype))
        hidden = self.qformer(
            query_embeds=self.queries.expand(features.shape[0], -1, -1),
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
        ).last_hidden_state
        vectors: Tensor = self.mlp(hidden)
        return vectors
