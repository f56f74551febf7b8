"""The same work on many items, in processes that each set up once, a model for instance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

In = TypeVar("In")
Out = TypeVar("Out")


def each(
    make: Callable[[], Callable[[In], Out]],
    items: Iterable[In],
    *,
    workers: int,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[Out]:
    """What the function that `make` returns gives for each item, in the order in which they are done.

    To be called inside a connection to Ray. `make` is called once in each of `workers` processes; items are taken from
    `items` as workers become free, so that nothing piles up. A worker that dies is started again and its item with it,
    three times; what the function raises is raised here.
    """
    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3)(
        _Worker
    )
    waiting = iter(items)
    running: dict[Any, Any] = {}
    for item in itertools.islice(waiting, workers):
        actor = worker.remote(make)
        running[actor.run.remote(item)] = actor
    while running:
        (done,), _ = ray.wait(list(running))
        actor = running.pop(done)
        for item in waiting:
            running[actor.run.remote(item)] = actor
            break
        result: Out = ray.get(done)
        yield result


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._work = make()

    def run(self, item: Any) -> Any:
        return self._work(item)
