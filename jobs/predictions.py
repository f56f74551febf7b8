"""The answers of a run on disk: predictions.jsonl and masks/NUMBER.npz, as `crab report` and the scorers read them.

Masks go to disk as they come and are read one at a time, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crab.samples import Sample
from crab.tasks import Answer, Masks

PREDICTIONS = "predictions.jsonl"
MASKS = "masks"


@dataclass(frozen=True, kw_only=True)
class Said:
    """The answer to one sample."""

    text: str
    finished: bool
    """False: the text was cut at the limit of tokens."""
    goodness: float
    """See Task.goodness."""
    masks: bytes | None
    """An .npz file; see `masks_to_npz`."""


class Predictions(Mapping[str, Answer]):
    """Answers by sample id. Masks are read when an answer is looked up, and forgotten with it."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        """Starts with none in `folder`, which loses those of a run before. Answers are numbered as `samples` are."""
        self._folder, self._samples = folder, samples
        self._number = {sample.id: number for number, sample in enumerate(samples)}
        self._said: dict[str, Said] = {}
        self._masks: dict[str, str] = {}
        shutil.rmtree(folder / MASKS, ignore_errors=True)
        (folder / PREDICTIONS).unlink(missing_ok=True)
        (folder / MASKS).mkdir(parents=True)

    def add(self, sample_id: str, said: Said) -> None:
        """Keeps an answer; its masks are in a file afterwards."""
        if said.masks is not None:
            name = f"{MASKS}/{self._number[sample_id]:06d}.npz"
            (self._folder / name).write_bytes(said.masks)
            self._masks[sample_id] = name
        self._said[sample_id] = Said(
            text=said.text, finished=said.finished, goodness=said.goodness, masks=None
        )

    def write(self) -> None:
        """predictions.jsonl: a line a sample, also for those without an answer."""
        with (self._folder / PREDICTIONS).open("w", encoding="utf-8") as file:
            for sample in self._samples:
                said = self._said.get(sample.id)
                row = {
                    "sample": sample.model_dump(mode="json", exclude_none=True),
                    "text": said.text if said else None,
                    "finished": bool(said and said.finished),
                    "goodness": said.goodness if said else None,
                    "masks": self._masks.get(sample.id),
                }
                file.write(json.dumps(row) + "\n")

    def masks_bytes(self) -> int:
        """Size of all mask files together."""
        return sum((self._folder / name).stat().st_size for name in self._masks.values())

    def __getitem__(self, sample_id: str) -> Answer:
        name = self._masks.get(sample_id)
        return Answer(
            text=self._said[sample_id].text,
            masks=None if name is None else read_masks(self._folder / name),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)


def masks_to_npz(masks: Masks) -> bytes:
    """`frames` int64 [T] and `values` [T, H, W] as one .npz file, compressed."""
    buffer = io.BytesIO()
    # Not np.savez_compressed: its zlib level 6 takes 1.6 times as long for a hundredth less.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in (("frames", np.asarray(masks.frames)), ("values", masks.values)):
            with file.open(f"{name}.npy", "w") as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return buffer.getvalue()


def read_masks(path: Path) -> Masks:
    """What `masks_to_npz` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return Masks(frames=tuple(file["frames"].tolist()), values=file["values"])
