"""A store over a network that loses, doubles and delays: one dict, and a client of it in each process.

Everything the product promises of a store holds: names are created once or not at all, a read sees what was written,
a listing comes in pages in the order of names. All else goes wrong by seed.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from simulation.world import Killed, Process, World

from crab_platform.ranges import Piece, Range
from crab_platform.retry import Taken, Transient, create_with_retries
from crab_platform.storage import Buffers, Data, OnRange, Store, StoreUnreachable

T = TypeVar("T")

LATEST_S = 1750.0
"""A request arrives within half an hour or never, whether its sender still waits or not."""


@dataclass(kw_only=True)
class Faults:
    """How often what goes wrong, a request; each history draws its own."""

    lost: float = 0.0
    """The request, or its answer, disappears."""
    late: float = 0.0
    """It arrives long after its sender has given up on it."""
    busy: float = 0.0
    """409 for a write, 503 for all else."""
    doubled: float = 0.0
    """It arrives twice."""
    crash: float = 0.0
    pause: float = 0.0
    latency_s: float = 1.0
    page: int = 1000
    """Names in one page of a listing."""

    def stop(self) -> None:
        """From now on nothing goes wrong."""
        self.lost = self.late = self.busy = self.doubled = self.crash = self.pause = 0.0


class Network:
    """The far side: what is stored, and who is told when it changes."""

    def __init__(self, world: World, faults: Faults) -> None:
        self.world = world
        self.faults = faults
        self.files: dict[str, bytes] = {}
        self.names: list[str] = []
        self._marks: dict[str, object] = {}
        self.on_create: Callable[[str, bytes, str], None] = lambda path, data, who: None
        self.on_delete: Callable[[str, str], None] = lambda path, who: None

    def put(self, path: str, data: bytes, mark: object, who: str) -> None:
        if path in self.files:
            raise Taken("412")
        self.files[path] = data
        self._marks[path] = mark
        insort(self.names, path)
        self.world.note(who, "created ", path)
        self.on_create(path, data, who)

    def written_by(self, path: str, mark: object) -> bool:
        if path not in self.files:
            raise Transient("it was there and is gone")
        return self._marks[path] is mark

    def delete(self, path: str, who: str) -> None:
        if path not in self.files:
            return
        del self.files[path]
        self.names.remove(path)
        self.world.note(who, "deleted ", path)
        self.on_delete(path, who)

    def get(self, path: str) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def page(self, prefix: str, after: str) -> list[str]:
        start = bisect_right(self.names, max(after, prefix))
        found = self.names[start : start + self.faults.page]
        return [name for name in found if name.startswith(prefix)]

    def damage(self, path: str, spot: int) -> None:
        """Changes a byte behind everybody's back."""
        data = bytearray(self.files[path])
        data[spot] ^= 1
        self.files[path] = bytes(data)


class SimStore(Store):
    """What one process has of the network."""

    url = "sim://store"

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process
        self._world = network.world
        self._random = network.world.rng.random

    def create(self, path: str, data: Data) -> None:
        """As `objects.ObjectStore.create`: the product's own loop, with a mark of this call."""
        mark = object()
        network, who = self._network, self._process.name
        stored = bytes(data)

        def write() -> None:
            network.put(path, stored, mark, who)

        create_with_retries(
            lambda: self._request(write, "create ", path),
            lambda: self._request(lambda: network.written_by(path, mark), "whose is ", path),
            clock=self._process.clock,
            budget_s=60.0,
            what=path,
        )

    def read(self, path: str) -> bytes:
        return self._insist(lambda: self._network.get(path), "read ", path)

    def size(self, path: str) -> int:
        return len(self._insist(lambda: self._network.get(path), "size ", path))

    def list(self, prefix: str = "") -> list[str]:
        found: list[str] = []
        network = self._network
        folder, after = (f"{prefix}/" if prefix else ""), ""
        while True:
            page = self._insist(partial(network.page, folder, after), "list ", prefix)
            found += page
            if len(page) < network.faults.page:
                return found
            after = page[-1]

    def delete(self, path: str) -> None:
        network, who = self._network, self._process.name
        self._insist(lambda: network.delete(path, who), "delete ", path)

    def _read_piece(self, path: str, piece: Piece) -> memoryview:
        return memoryview(self.read(path)[piece.start : piece.stop])

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        # Without the threads of the real one; the order of arrival is chance there, too.
        order = list(dict.fromkeys(paths))
        self._world.rng.shuffle(order)
        found = {path: self.read(path) for path in order}
        return [found[path] for path in paths]

    def delete_all(self, paths: Sequence[str]) -> None:
        order = list(paths)
        self._world.rng.shuffle(order)
        for path in order:
            self.delete(path)

    def read_many(
        self, wanted: Mapping[str, Sequence[Range]], on_range: OnRange | None = None
    ) -> dict[str, Buffers]:
        # One file at a time, for then the real one needs no threads.
        found: dict[str, Buffers] = {}
        for path, ranges in wanted.items():
            found |= super().read_many({path: ranges}, on_range)
        return found

    def _insist(self, effect: Callable[[], T], *what: str) -> T:
        """As obstore does for what may be repeated: six attempts within a minute."""
        started = self._world.now
        for _ in range(6):
            if self._world.now - started > 60.0:
                break
            try:
                return self._request(effect, *what, writes=False)
            except Transient:
                self._world.wait(self._random())
        raise StoreUnreachable("".join(what))

    def _request(self, effect: Callable[[], T], *what: str, writes: bool = True) -> T:
        """Sends one request and waits for its answer, or raises Transient."""
        world, faults, process = self._world, self._network.faults, self._process
        if process.dead:
            raise Killed
        luck = self._random()
        there_s = self._random() * faults.latency_s
        most = faults.crash + faults.lost + faults.late + faults.busy + faults.doubled
        if luck < most + faults.pause:
            self._trouble(luck, there_s, effect, "".join(what), writes=writes)
        if process.paused_until <= world.now and world.is_idle_for(there_s):
            world.now += there_s
            there_s = 0.0
            answers = [_outcome(effect)]
        else:
            answers = []
            world.at(there_s, lambda: answers.append(_outcome(effect)))
        world.wait(there_s + 0.001 + self._random() * faults.latency_s)
        answer = answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]  # whatever the effect gave

    def _trouble(
        self, luck: float, there_s: float, effect: Callable[[], Any], what: str, *, writes: bool
    ) -> None:
        """What goes wrong with a request that is out of luck; raises unless it arrives all the same."""
        world, faults, process = self._world, self._network.faults, self._process
        rng = world.rng
        if luck < (edge := faults.crash):
            if rng.random() < 0.5:  # sent before it dies
                world.at(there_s, partial(_outcome, effect))
            world.note(process.name, f"dies at: {what}")
            process.kill()
            raise Killed
        if luck < (edge := edge + faults.lost):
            if rng.random() < 0.5:
                world.note(process.name, f"the request is lost: {what}")
            else:
                world.note(process.name, f"the answer is lost: {what}")
                world.at(there_s, partial(_outcome, effect))
            world.wait(10.0)
            raise Transient("no answer")
        if luck < (edge := edge + faults.late):
            if writes:
                late_s = rng.random() * LATEST_S
                world.note(process.name, f"arrives {late_s:.0f} s late: {what}")
                world.at(late_s, partial(_outcome, effect))
            world.wait(10.0)
            raise Transient("no answer")
        if luck < (edge := edge + faults.busy):
            world.wait(there_s)
            raise Transient("409")
        if luck < (edge := edge + faults.doubled):
            world.at(there_s * rng.random(), partial(_outcome, effect))
        if luck < edge + faults.pause:
            process.pause(rng.choice((20.0, 200.0, 1500.0, 20_000.0)))


def _outcome(effect: Callable[[], Any]) -> Any:
    """What an effect gives; an error that its sender is told is given, not raised."""
    try:
        return effect()
    except (Taken, Transient, FileNotFoundError) as error:
        return error
