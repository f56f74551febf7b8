"""The Ray Data graph of a preprocess job: files that must be opened in, rows out.

Where CPUs are scarce, decoding and encoding run *fused* in one actor (nothing but rows leaves it); where decode cores
are plentiful they are *split*: tasks decode, actors encode, one array a stream between them. `docs/log.md` has the
measurements.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.data

from crab_platform import ray_cluster
from crab_platform.index import CacheIndex
from crab_platform.transit import Row, row_from_json
from crab_platform.work import Source, Work
from crab_platform.worker import EncodeActor, decode_task, source_to_head


def on_ray(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
    """Rows of these files as their packs are committed, computed on the cluster that we are on or on one of our own."""
    with ray_cluster.connected():
        yield from _rows(work, sources, index)


def _rows(work: Work, sources: Sequence[Source], index: CacheIndex) -> Iterator[Row]:
    config = work.config
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.execution_options.preserve_order = False
    # Once into the object store; every worker of a node maps the same copy. In a tuple, because Ray would otherwise
    # fetch it for the actor's constructor and warn that a restart depends on it; we hold it until the end.
    shared_index = (ray.put(index),)
    heads = [{"head": source_to_head(source)} for source in sources]
    per_task = config.clips_per_pack if config.mode == "fused" else config.clips_per_decode
    actors = min(config.encode_actors, len(sources))
    blocks = -(-len(heads) // per_task)
    dataset: ray.data.Dataset = ray.data.from_items(heads, override_num_blocks=blocks)
    if config.mode == "split":
        dataset = dataset.map_batches(
            partial(decode_task, work=work, index=shared_index),
            batch_size=config.clips_per_decode,
            batch_format="pyarrow",
            compute=ray.data.TaskPoolStrategy(size=config.decode_tasks),
            num_cpus=1,
        )
    dataset = dataset.map_batches(
        EncodeActor,
        batch_size=config.clips_per_pack,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        fn_constructor_kwargs={"work": work, "index": shared_index},
        num_cpus=config.encode_cpus,
        num_gpus=config.encode_gpus or None,
    )
    block: Any
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for text in block.column("row").to_pylist():
            yield row_from_json(text)
