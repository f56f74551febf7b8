"""Symbols: what a perfect projector would tell the LLM of a second, made from the scene instead of from features.

A frame has a slot for each cell of the scenes' 3 x 2 grid, a segment one for each colour; the classes of a colour that
sound together share theirs. A slot's vector is that of the class it names (the sum of them where it names several); a
cell's also holds which cell it is and its object's box. The LLM learns the tasks from these vectors, and the
projectors then learn to make them.

Legend: T seconds, M frames or segments, S slots, W width of the LLM.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from crab.synth.boxes import tight_box
from crab.synth.scene import CLASS_NAMES, COLOURS, COLUMNS, NUM_ROWS, Scene, on
from crab.tasks.arig import Box

VIDEO_SLOTS = len(COLUMNS) * NUM_ROWS
AUDIO_SLOTS = len(COLOURS)

WORDS = (" nothing", *(f" {name}" for name in CLASS_NAMES))

DIGITS = (3, 10, 10)
"""A coordinate is told as its hundreds, tens and ones: what is to be written can be copied."""

PLACE = VIDEO_SLOTS + 4 * sum(DIGITS)
"""Numbers beside a video slot's word: its cell, then left, top, right and bottom edge."""


def video_symbols(scene: Scene) -> np.ndarray:
    """[T, 6, words + PLACE] float32; the slots are the cells, column by column."""
    slots = np.zeros((scene.duration_s, VIDEO_SLOTS, len(WORDS) + PLACE), dtype=np.float32)
    slots[:, :, 0] = 1
    for actor in scene.actors:
        for second in range(scene.duration_s):
            if not on(actor.visible, second):
                continue
            cell = actor.column * NUM_ROWS + actor.row
            slot = slots[second, cell]
            slot[0], slot[WORDS.index(f" {actor.name}")] = 0, 1
            slot[len(WORDS) :] = _place(cell, tight_box(scene, actor, second))
    return slots


def audio_symbols(scene: Scene) -> np.ndarray:
    """[T, 4, words] float32; the slots are the colours, so that a class stays in its slot."""
    slots = np.zeros((scene.duration_s, AUDIO_SLOTS, len(WORDS)), dtype=np.float32)
    slots[:, :, 0] = 1
    for actor in scene.heard:
        for second in range(scene.duration_s):
            if on(actor.sounding, second):
                slot = slots[second, COLOURS.index(actor.colour)]
                slot[0], slot[WORDS.index(f" {actor.name}")] = 0, 1
    return slots


def _place(cell: int, box: Box) -> np.ndarray:
    """The cell as one-hot, then the three digits of each edge as one-hots."""
    place = np.zeros(PLACE, dtype=np.float32)
    place[cell] = 1
    start = VIDEO_SLOTS
    for pixel in box:
        for digit, kinds in zip((pixel // 100, pixel // 10 % 10, pixel % 10), DIGITS, strict=True):
            place[start + digit] = 1
            start += kinds
    return place


OWN_STD, CELL_STD, DIGIT_STD, TIME_STD = 0.1, 0.1, 0.03, 0.05
"""First sizes of what a slot's vector is the sum of: a class (beside its word), its cell, twelve digits, its second."""

LIKE_ITS_WORD = 2.0
"""How much of a word's embedding is in what says the same in a slot, a class or a second: heads that compare what they
read should see at once which slots the words of a text are about."""


class SymbolReader(nn.Module):
    """Stands where a projector stands: symbols [M, S, words (+ PLACE)] -> vectors [M, S, W], with noise in training."""

    noise = 0.1
    """Of the vectors' own size: real projectors will never hit them exactly."""

    def __init__(
        self,
        llm: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        num_slots: int,
        num_places: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.num_queries, self.feature_size = num_slots, len(WORDS) + num_places
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in WORDS]
        longest = max(map(len, ids))
        self._ids = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        self._share = torch.tensor(
            [[1 / len(r)] * len(r) + [0.0] * (longest - len(r)) for r in ids]
        )
        self._embedding = [llm.get_input_embeddings()]  # in a list: not a submodule a second time
        self._generator = torch.Generator().manual_seed(seed)
        width = llm.config.hidden_size
        start = torch.randn(len(WORDS) + num_places, width, generator=self._generator)
        own, place = start.split([len(WORDS), num_places])
        place[:VIDEO_SLOTS] *= CELL_STD
        place[VIDEO_SLOTS:] *= DIGIT_STD
        self.own, self.place = nn.Parameter(own * OWN_STD), nn.Parameter(place)

    def forward(self, symbols: Tensor, mask: Tensor | None = None) -> Tensor:
        names, places = symbols.float().split(
            [len(self._ids), self.feature_size - len(self._ids)], -1
        )
        vectors = names @ self.words() + places @ self.place
        if not self.training:
            return vectors
        size = vectors.detach().pow(2).mean().sqrt()
        return vectors + self.noise * size * torch.randn(vectors.shape, generator=self._generator)

    def words(self) -> Tensor:
        """[words, W]: the mean embedding of each word's tokens, and a vector of its own.

        Without the latter, "red circle" and "blue square" together are the same as "blue circle" and "red square" to
        a head that looks at all slots, and lists of classes were not learnt in a thousand steps.
        """
        mean = (self._embedding[0](self._ids) * self._share.unsqueeze(-1)).sum(1)
        return LIKE_ITS_WORD * mean + self.own
