"""A sweep in MLflow: a run for each trial below the run of the sweep, continued after a restart, none left RUNNING.

Ray Tune's loop never waits for MLflow: what happens goes into a queue, and one thread logs it.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from crab_platform import tracking
from crab_platform.storage import AlreadyExists, Store
from crab_platform.tracking import Run
from crab_platform.trial_journal import FOLDER, TrialRecord

_LOG = logging.getLogger(__name__)
_DONE = "tracked.json"
"""In a trial's folder, when all of it is in MLflow."""


class _TrialFailed(Exception):  # noqa: N818 (what happened, not what is raised to anybody)
    """Ends a run as FAILED."""


class SweepTracking:
    """Observes a sweep (sweep_watch.Observer). Use as a context manager; what is on its way is logged at the end."""

    def __init__(
        self,
        parent: Run,
        store: Store,
        *,
        identity: str,
        folder: Path,
        spec_of: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        name_of: Callable[[TrialRecord], str],
    ) -> None:
        """
        Args:
            identity: of the sweep, with which its trials' runs are found again.
            folder: of the job on this machine, for spools.
            spec_of: the parameters of a sample's run.
            name_of: what MLflow shows.
        """
        self._parent, self._store, self._identity, self._folder = parent, store, identity, folder
        self._spec_of, self._name_of = spec_of, name_of
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._open: dict[int, tuple[Run, ExitStack]] = {}
        self._logged: dict[int, int] = {}
        self._thread = Thread(target=self._work, name="sweep-tracking", daemon=True)
        self._error: BaseException | None = None

    def started(self, record: TrialRecord) -> None:
        self._queue.put(lambda: self._start(record))

    def shown(self, number: int, step: int, metrics: dict[str, float]) -> None:
        self._queue.put(lambda: self._show(number, step, metrics))

    def ended(self, record: TrialRecord) -> None:
        self._queue.put(lambda: self._end(record))

    def __enter__(self) -> SweepTracking:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is not None:
                continue
            try:
                job()
            except Exception as error:  # raised at the end, where somebody hears it
                self._error = error
        for run, stack in self._open.values():
            run.tag("stopped_by", "the end of the sweep; start it again to go on")
            stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)  # KILLED

    def _start(self, record: TrialRecord) -> None:
        if record.number in self._open or self._store.exists(self._done(record.number)):
            return
        stack = ExitStack()
        run = stack.enter_context(
            tracking.start_run(
                self._parent.tracking_uri,
                self._parent.experiment,
                self._name_of(record),
                spec=self._spec_of(record.config),
                tags={
                    "mlflow.parentRunId": self._parent.run_id,
                    "trial": str(record.number),
                },
                folder=self._folder / f"{record.number:05d}",
                resume=f"{self._identity}-{record.number}",
                resume_finished=True,
            )
        )
        self._open[record.number] = run, stack

    def _show(self, number: int, step: int, metrics: dict[str, float]) -> None:
        if number in self._open and step > self._logged.get(number, 0):
            self._logged[number] = step
            self._open[number][0].metrics(metrics, step)

    def _end(self, record: TrialRecord) -> None:
        if record.number not in self._open or record.end is None:
            return
        run, stack = self._open.pop(record.number)
        run.tag("status", record.end.status)
        run.tag("stopped_by", record.end.reason)
        run.tag("failures", str(len(record.failures)))
        if record.end.status == "failed":
            failure = _TrialFailed(record.end.reason)
            stack.__exit__(_TrialFailed, failure, None)
        else:
            stack.close()
        try:
            self._store.create(self._done(record.number), b"{}")
        except AlreadyExists:
            return

    def _done(self, number: int) -> str:
        return f"{FOLDER}/{number:05d}/{_DONE}"
