"""Brings spools to MLflow: beside a running job in a process of its own, or afterwards by `crab replay`.

A process, because MLflow's client takes the interpreter from the training loop while it works, and waits for minutes
where a job wants to end. It reads what the job has appended, sends it in batches, and moves the cursor after each. It
may die at any moment: whoever comes next asks the server what has arrived. When the job dies without a word, what it
had written is sent, and its run is KILLED.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from crab_platform.clock import SYSTEM, Clock
from crab_platform.spool import (
    FOLDER,
    Cursor,
    Piece,
    Record,
    delivering,
    is_written,
    load_cursor,
    read,
    remove,
    save_cursor,
    set_aside,
    spools,
)

_LOOK_S = 0.3
"""Pause between two looks at a spool that has nothing new."""
_FIRST_PAUSE_S = 0.3
_LONGEST_PAUSE_S = 5.0
"""After this pause at most a server that is back is noticed."""
_SHORTEST_LIMIT_S = 5
_LONGEST_LIMIT_S = 60
"""Time limits of a request: doubled while they are not kept, since a slow server may need more, a dead one less."""
_MOST_RECORDS = 1000

_LIMIT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_QUIET = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"


class Target(Protocol):
    """What records are applied to; crab_platform.mlflow_records has the real one."""

    run_id: str | None

    def apply(self, records: Sequence[Record]) -> None:
        """Does what the records say. Raises Refused for what will never be done, else anything."""


MakeTarget = Callable[[str, str | None], Target]
"""(tracking URI, the run's id if known) -> target."""


def to_mlflow(tracking_uri: str, run_id: str | None) -> Target:
    """The real target. MLflow is imported here: a job whose server is remote does not need it itself."""
    from crab_platform.mlflow_records import Records

    return Records(tracking_uri, run_id)


class Delivery:
    """The way of one spool."""

    def __init__(self, path: Path, make: MakeTarget = to_mlflow) -> None:
        self.path = path
        self.cursor = load_cursor(path)
        self._make = make
        self._target: Target | None = None
        self._alone_until = 0
        """Before this offset is something that the server refuses among others."""
        first = next(read(path), None)
        self.first: Record | None = first.record if first else None
        """What the run is; None when the file was spoiled where that stands."""

    @property
    def uri(self) -> str | None:
        """Where it goes; None when nobody knows any more."""
        return self.first["uri"] if self.first else None

    def step(self) -> bool:
        """Sends what is there. True when all that will ever come has been sent.

        Raises what the server raises; then the same step may be tried again.
        """
        if self.first is None:
            raise ValueError(
                f"{self.path}: its first line is spoiled, and that says whose run it is"
            )
        if not self.cursor.ended:
            writes_on = is_written(self.path)  # asked before reading: nothing can come after a no
            pieces = read(self.path, self.cursor.offset)
            for batch in _batches(pieces):
                self._send(batch)
            if not self.cursor.ended and not writes_on:
                self._apply([{"op": "end", "status": "KILLED", "time": self.cursor.last_ms}])
                self._move(ended=True)
        return self.cursor.ended

    def note(self, trouble: str) -> None:
        """Tells those who look at the cursor why it is not going on."""
        if trouble != self.cursor.trouble:
            self._move(trouble=trouble, busy="")

    def _send(self, batch: list[Piece]) -> None:
        from crab_platform.mlflow_records import Refused

        if len(batch) > 1 and batch[0].end <= self._alone_until:
            for piece in batch:
                self._send([piece])
            return
        whole = [piece.record for piece in batch if piece.record is not None]
        cursor = self.cursor
        refused = 0
        try:
            if whole:
                self._apply(whole)
        except Refused as error:
            if whole[0]["op"] == "run":
                raise  # without a run there is nowhere to go
            if len(whole) > 1:
                self._alone_until = batch[-1].end
                self._send(batch)
                return
            set_aside(self.path, whole[0], str(error))
            refused = 1
        self._move(
            offset=batch[-1].end,
            run_id=self._target.run_id if self._target else cursor.run_id,
            ended=any(record["op"] == "end" for record in whole),
            last_ms=max([cursor.last_ms, *(record.get("time", 0) for record in whole)]),
            trouble="",
            busy="",
            delivered=cursor.delivered + len(whole) - refused,
            refused=cursor.refused + refused,
            damaged=cursor.damaged + len(batch) - len(whole),
        )

    def _apply(self, records: Sequence[Record]) -> None:
        assert self.first is not None
        if self._target is None:
            self._target = self._make(self.first["uri"], self.cursor.run_id)
        if records[0]["op"] in ("file", "model"):
            self._move(busy=records[0]["path"])
        self._target.apply(records)

    def _move(self, **changes: Any) -> None:
        self.cursor = replace(self.cursor, **changes)
        save_cursor(self.path, self.cursor)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Metrics together as far as they go in one request, everything else alone, in the order in which it came."""
    batch: list[Piece] = []
    values = 0
    for piece in pieces:
        record = piece.record
        if record is not None and record["op"] == "metrics":
            if batch and values + len(record["values"]) > _MOST_RECORDS:
                yield batch
                batch, values = [], 0
            batch.append(piece)
            values += len(record["values"])
            continue
        if batch:
            yield batch
            batch, values = [], 0
        yield [piece]
    if batch:
        yield batch


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one spool."""

    path: Path
    cursor: Cursor
    """As it was at last: a spool that is delivered is removed."""


def bring(
    delivery: Delivery,
    *,
    until: Callable[[], bool],
    failing: Callable[[int, float], bool],
    note: Callable[[str], None] | None = None,
    clock: Clock = SYSTEM,
) -> bool:
    """Delivers a spool to its end and removes it, however often the server fails.

    Args:
        delivery: what is brought.
        until: asked when all that is there was sent but no end: True stops looking for more.
        failing: (failures in a row, seconds that they last): True gives up.
        note: told the trouble, besides the spool's own cursor.

    Returns:
        Whether all was delivered.
    """
    failures, slow, since = 0, 0, 0.0
    while True:
        stop = until()  # asked before the look, so that what came before it was seen
        began, offset = clock.monotonic(), delivery.cursor.offset
        try:
            with limited(slow) as limit_s:
                done = delivery.step()
            failures = slow = 0
            if done:
                remove(delivery.path)
                return True
            if stop:
                return False
            clock.sleep(_LOOK_S)
        # Whatever it is, the record stays, the trouble is told, and it is tried again.
        except Exception as error:  # whatever the client raises is told, noted, and tried again
            said = f"{type(error).__name__}: {error}"
            if said != delivery.cursor.trouble:
                print(said, file=sys.stderr, flush=True)
            delivery.note(said)
            if note is not None:
                note(said)
            now = clock.monotonic()
            if delivery.cursor.offset != offset:  # it did go on
                failures, slow, began = 0, 0, now
            since = since if failures else began
            failures += 1
            slow += now - began > 0.9 * limit_s
            if failing(failures, clock.monotonic() - since):
                return False
            longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures)
            clock.sleep(longest_s * (0.5 + clock.random() / 2))


@contextmanager
def limited(slow: int) -> Iterator[float]:
    """MLflow's client for the block: no repeats of its own, which would be blind ones, and a limit on each request.

    The limit grows with the number of times that it was not kept, and is yielded. Who sets one knows the server.
    """
    limit_s = min(_LONGEST_LIMIT_S, _SHORTEST_LIMIT_S * 2 ** min(slow, 10))
    limit_s = int(os.environ.get(_LIMIT, limit_s))
    before = {name: os.environ.get(name) for name in (_LIMIT, _RETRIES, _QUIET)}
    os.environ[_RETRIES] = "0"
    os.environ[_QUIET] = "true"
    os.environ[_LIMIT] = str(limit_s)
    try:
        yield limit_s
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def deliver_folder(
    folder: Path, *, give_up_s: float = 30.0, make: MakeTarget = to_mlflow, clock: Clock = SYSTEM
) -> list[Outcome]:
    """Delivers what jobs that ended or died have left in a folder of spools; the oldest first.

    A spool whose job still runs, or is being delivered by another process, is left to it.
    """
    found: list[Outcome] = []
    with delivering(folder, wait=False) as mine:
        for path in spools(folder) if mine else []:
            if is_written(path):
                continue
            delivery = Delivery(path, make)
            patience_s = give_up_s if delivery.first else 0.0
            bring(delivery, until=lambda: True, failing=_for_seconds(patience_s), clock=clock)
            found.append(Outcome(path=path, cursor=delivery.cursor))
    return found


def _for_seconds(most: float) -> Callable[[int, float], bool]:
    return lambda failures, seconds: seconds >= most


def waiting(top: Path) -> list[Path]:
    """The folders of spools in and below a folder in which something waits."""
    return sorted(
        {path.parent for path in top.rglob(f"{FOLDER}/*.jsonl")} | ({top} if spools(top) else set())
    )


def accompany(path: Path, parent: int, make: MakeTarget = to_mlflow) -> bool:
    """Delivers the spool of a running job, after those which earlier runs left in its folder for the same server."""

    def orphaned() -> bool:
        return os.getppid() != parent

    def gives_up(failures: int, seconds: float) -> bool:
        return orphaned()

    own = Delivery(path, make)
    with delivering(path.parent, wait=True):
        for older in spools(path.parent):
            if older >= path or is_written(older):
                continue
            before = Delivery(older, make)
            if before.uri == own.uri and not bring(
                before, until=lambda: True, failing=gives_up, note=own.note
            ):
                return False  # orphaned: the server does not answer, so it would not now
        return bring(own, until=orphaned, failing=gives_up)


def main() -> None:
    """`python -m crab_platform.delivery SPOOL PARENT`: what tracking.start_run starts."""
    began = time.monotonic()
    done = accompany(Path(sys.argv[1]), int(sys.argv[2]))
    if not done:
        print(f"left after {time.monotonic() - began:.0f} s, not all delivered", file=sys.stderr)
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
