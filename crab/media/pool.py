"""A pool of decoding children: what native code does to one clip costs that clip.

Each worker slot is a thread that owns one child, hands it one clip at a time, and kills it when it
is late. Limits are on wall time and memory per clip; a clip gets two attempts in all; children are
replaced every N clips, since native libraries leak.

Why not pebble or loky: tried with pebble 5.2, killing a child while its answer was on the way broke
the whole pool (`BrokenProcessPool: All workers expired`, then `RuntimeError` for ever), as its
children share one pipe and one lock; loky and concurrent.futures fail every pending item when one
child dies and cannot end a late one.
"""

import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from crab.media.clip import decode_request
from crab.media.process import ChildDiedError, ChildProcess, ChildTimeoutError
from crab.media.reasons import RETRIED, Failure, Reason, one_line
from crab.media.request import Decoded, DecodeRequest

MAX_ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolResult:
    """One answer of the pool."""

    index: int  # place of the request in what was given to `decode`
    request: DecodeRequest
    decoded: Decoded
    attempts: int
    wall_s: float  # all attempts together


@dataclass(kw_only=True, eq=False)
class _Task:
    index: int
    request: DecodeRequest
    done: "queue.SimpleQueue[PoolResult | BaseException]"


class DecodePool:
    """Children that decode. Use as a context manager, or call `close`; not to be sent to another
    process.

        with DecodePool(num_workers=4) as pool:
            for result in pool.decode(requests):
                ...

    `decode` may be called from several threads at once. `timeout_s` counts reading and decoding of
    one clip, once per attempt; `memory_bytes` is what one child may allocate over its size at the
    start.
    """

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_s: float = 60.0,
        memory_bytes: int = 2 << 30,
        max_items_per_child: int = 200,
        decode: Callable[[DecodeRequest], Decoded] = decode_request,
    ) -> None:
        """`decode` must be a module-level function: the children import it by name."""
        for name, value in (
            ("num_workers", num_workers),
            ("timeout_s", timeout_s),
            ("memory_bytes", memory_bytes),
            ("max_items_per_child", max_items_per_child),
        ):
            if value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0")
        try:
            pickle.dumps(decode)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"decode is {decode!r}; expected a module-level function, as children import it by name"
            ) from error
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._max_items = max_items_per_child
        self._decode = decode
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._children: dict[int, ChildProcess] = {}  # by slot
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"decode-{slot}", daemon=True)
            for slot in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the children, busy or not, and end the threads. A `decode` under way raises
        RuntimeError.
        """
        with self._lock:
            self._closed = True
            children = list(self._children.values())
        for _ in self._threads:
            self._tasks.put(None)
        for child in children:
            child.interrupt()
        for thread in self._threads:
            thread.join()

    def child_pids(self) -> list[int]:
        """Process ids of the children that live now."""
        with self._lock:
            return [child.pid for child in self._children.values() if child.is_alive()]

    def decode(
        self, requests: Iterable[DecodeRequest], *, ordered: bool = True
    ) -> Iterator[PoolResult]:
        """Decode a stream of requests, yielding one result for each.

        In the order of the requests, or as they are done with `ordered=False` (then `index` tells
        which is which). Requests are taken from the iterable as there is room: at most two per
        child are held here, so a slow consumer holds back the decoders. Raises RuntimeError if
        children cannot be started.
        """
        done: queue.SimpleQueue[PoolResult | BaseException] = queue.SimpleQueue()
        window = 2 * len(self._threads)
        source = enumerate(requests)
        waiting: dict[int, PoolResult] = {}
        num_open = num_yielded = 0
        exhausted = False
        while True:
            while not exhausted and num_open + len(waiting) < window:
                item = next(source, None)
                if item is None:
                    exhausted = True
                    break
                self._submit(_Task(index=item[0], request=item[1], done=done))
                num_open += 1
            if num_open == 0 and not waiting:
                return
            if ordered and num_yielded in waiting:
                yield waiting.pop(num_yielded)
                num_yielded += 1
                continue
            result = done.get()
            num_open -= 1
            if isinstance(result, BaseException):
                raise result
            if ordered:
                waiting[result.index] = result
            else:
                yield result

    def _submit(self, task: _Task) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("the decode pool is closed; make a new one")
            self._tasks.put(task)

    def _serve(self, slot: int) -> None:
        """A slot's thread: owns the slot's child from start to end."""
        try:
            while (task := self._tasks.get()) is not None:
                try:
                    task.done.put(self._run(slot, task))
                except Exception as error:
                    task.done.put(error)  # raised where the results are read
        finally:
            self._discard(slot)

    def _run(self, slot: int, task: _Task) -> PoolResult:
        began = time.monotonic()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            decoded = self._attempt(slot, task.request)
            reasons = {problem.reason for problem in decoded.problems()}
            if attempt == MAX_ATTEMPTS or not reasons & RETRIED:
                break
        return PoolResult(
            index=task.index,
            request=task.request,
            decoded=decoded,
            attempts=attempt,
            wall_s=time.monotonic() - began,
        )

    def _attempt(self, slot: int, request: DecodeRequest) -> Decoded:
        try:
            child = self._child(slot)
            decoded = child.ask(request, self._timeout_s)
        except ChildTimeoutError as error:
            self._discard(slot)
            self._raise_if_closed()
            return Decoded.failed(request, Failure(reason=Reason.DECODE_TIMEOUT, detail=str(error)))
        except ChildDiedError as error:
            self._discard(slot)
            self._raise_if_closed()
            reason = Reason.DECODE_MEMORY if error.out_of_memory else Reason.DECODE_CRASH
            return Decoded.failed(request, Failure(reason=reason, detail=one_line(str(error))))
        assert isinstance(decoded, Decoded), f"decode returned {type(decoded).__name__}"
        # After it ran into its limit a child's heap is not worth keeping.
        full = any(problem.reason is Reason.DECODE_MEMORY for problem in decoded.problems())
        if full or child.num_answered > self._max_items:  # the first answer was "ready"
            self._discard(slot)
        return decoded

    def _child(self, slot: int) -> ChildProcess:
        """The slot's child, a new one if it has none or the old one died between two clips."""
        child = self._children.get(slot)
        if child is not None and child.is_alive():
            return child
        self._discard(slot)
        child = ChildProcess(self._decode, self._memory_bytes)
        with self._lock:
            self._children[slot] = child
            closed = self._closed
        if closed:
            self._discard(slot)
            self._raise_if_closed()
        return child

    def _discard(self, slot: int) -> None:
        with self._lock:
            child = self._children.pop(slot, None)
        if child is not None:
            child.kill()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("the decode pool was closed while it decoded")
