"""An adapter answers samples with cached features, in batches, in this process or in several beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crab.evaluate import get_task
from crab.predict import predict
from crab.tasks import Answer
from crab_platform import parallel, ray_cluster
from crab_platform.catalog import Manifest
from jobs.adapters import load_adapter
from jobs.features import FeatureReader, Item
from jobs.predictions import Said, masks_to_npz
from jobs.spec import Features


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Which adapter is asked, and how."""

    adapter: Path
    features: Features
    manifest: Manifest
    max_new_tokens: int
    device: str = "cpu"
    workers: int = 1
    batch_size: int = 16


def ask(how: Asking, items: Sequence[Item]) -> Iterator[tuple[str, Said]]:
    """(sample id, answer) for all items, in no particular order, as the batches are done."""
    # Like lengths together: all samples of a batch wait for the longest answer.
    order = sorted(items, key=lambda item: (item.sample.task, len(item.sample.instruction)))
    batches = [order[i : i + how.batch_size] for i in range(0, len(order), how.batch_size)]
    make: Callable[[], Answerer] = partial(Answerer, how)
    if how.workers == 1 and how.device == "cpu":
        for batch in map(make(), batches):
            yield from batch
        return
    gpus = 0 if how.device == "cpu" else 1
    with ray_cluster.connected():
        for batch in parallel.each(make, batches, workers=how.workers, gpus=gpus):
            yield from batch


class Answerer:
    """The adapter with its model and its way to the features, in one process."""

    def __init__(self, how: Asking) -> None:
        self._how = how
        self._model, self._collate = load_adapter(how.adapter, how.device)
        self._reader = FeatureReader(how.features, how.manifest, self._collate.layers)

    def __call__(self, items: Sequence[Item]) -> list[tuple[str, Said]]:
        """(sample id, answer) for one batch."""
        found = predict(
            self._model,
            self._collate,
            self._reader.examples(items),
            max_new_tokens=self._how.max_new_tokens,
            batch_size=len(items),
        )
        said = []
        for item, prediction in zip(items, found, strict=True):
            sample, masks = item.sample, prediction.masks
            answer = Answer(text=prediction.text, masks=masks)
            kept = Said(
                text=prediction.text,
                finished=prediction.finished,
                # Here and not when all are scored: the masks are at hand, and the processes share the work.
                goodness=get_task(sample.task).goodness(sample, answer),
                masks=None if masks is None else masks_to_npz(masks),
            )
            said.append((sample.id, kept))
        return said
