"""The audio encoder learns to name the timbres that sound in a second.

Legend: N seconds, C classes, T samples of a second.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crab.encoders.beats import Beats
from crab.pretrain.fit import OnStep, fit
from crab.synth.evidence import targets
from crab.synth.make import Dice
from crab.synth.scene import CLASS_NAMES, Scene
from crab.synth.sound import render_mono

SAMPLE_RATE_HZ = 16_000


def train_audio(
    model: Beats, pool: Sequence[Scene], *, steps: int, batch: int, seed: int, on_step: OnStep
) -> None:
    """Trains the mean token of a one-second segment to say which timbres sound in it; `batch` seconds a step."""
    head = nn.Linear(model.config.encoder_embed_dim, len(CLASS_NAMES))
    dice = Dice(seed, 2)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            picks = [dice.pick(pool) for _ in range(max(1, batch // 10))]
            waves = np.concatenate(
                [render_mono(scene, SAMPLE_RATE_HZ).reshape(-1, SAMPLE_RATE_HZ) for scene in picks]
            )
            heard = np.concatenate([targets(scene)[1] for scene in picks])
            # Loudness must not matter: codecs and microphones change it.
            gains = np.array([[dice.between(0.5, 2.0)] for _ in waves], dtype=np.float32)
            yield (
                torch.from_numpy((waves * gains).astype(np.float32)),
                torch.from_numpy(heard).float(),
            )

    def loss(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        waves_NT, heard_NC = inputs
        logits_NC = head(model(waves_NT).mean(1))
        exact = ((logits_NC > 0) == heard_NC.bool()).all(1).float().mean().item()
        return F.binary_cross_entropy_with_logits(logits_NC, heard_NC), {"exact_seconds": exact}

    fit(
        {1e-3: [*model.parameters(), *head.parameters()]},
        batches(),
        loss,
        steps=steps,
        on_step=on_step,
    )
