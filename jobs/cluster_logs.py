"""`crab logs`: what a job on a cluster has printed, from the bucket, while it runs and after its cluster is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from crab_platform import cluster
from crab_platform.attempts import Attempt, attempts
from crab_platform.cluster import state_of
from crab_platform.cluster_errors import ClusterError, ClusterRefused
from crab_platform.kube_api import KubeApi
from crab_platform.storage import Store, StoreError
from jobs.output import line

POLL_S = 2.0
ASK_S = 10.0
"""How often the cluster is asked whether the job is over, while nothing new is printed."""
SILENCE_S = 600.0
"""So long the bucket may be silent before nobody waits for it any more."""
Write = Callable[[bytes], object]


def logs(api: KubeApi, store: Store, job: str) -> list[dict[str, Any]]:
    """All attempts of a job, with their logs.

    Raises StoreUnreachable, and ClusterRefused where neither the bucket nor the cluster has such a job.
    """
    found = [
        {
            "attempt": each.number,
            **each.began(),
            "ended": each.ended(),
            "log": b"".join(data for _, data in each.pieces()).decode(errors="replace"),
        }
        for each in attempts(store, job)
    ]
    if not found:
        cluster.get(api, job)
    return found


def show_logs(api: KubeApi, store: Store, job: str, write: Write, *, follow: bool) -> None:
    """Writes a job's log, the attempts one after the other; with `follow` until the job is over.

    Raises:
        ClusterRefused: there is no such job, neither in the bucket nor in the cluster.
        StoreUnreachable: the bucket does not answer; with `follow` only after SILENCE_S.
    """
    reader = LogReader(store, job, write)
    if not follow:
        reader.read()
        if reader.attempt is None:
            line(f"{job} has not begun: {state_of(cluster.get(api, job)).sentence}")
        return
    heard = asked = time.monotonic()
    while True:
        try:
            more = reader.read()
            heard = time.monotonic()
        except StoreError:
            if time.monotonic() - heard > SILENCE_S:
                raise
            more = False
        if not more and time.monotonic() - asked > ASK_S:
            asked = time.monotonic()
            if _is_over(api, job) and not reader.read():
                return
        time.sleep(POLL_S)


@contextmanager
def shown_meanwhile(store: Store, job: str, write: Write) -> Iterator[None]:
    """A job's log is written while the body waits for its end, by another thread. A bucket that does not answer is
    said once, and spoils nothing else."""
    reader, is_over = LogReader(store, job, write), threading.Event()

    def run() -> None:
        said = False
        while True:
            last = is_over.wait(POLL_S)
            try:
                reader.read()
            except StoreError as error:
                if not said:
                    line(f"the log cannot be shown: {error}")
                said = True
            if last:
                return

    thread = threading.Thread(target=run, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class LogReader:
    """Goes on where it was."""

    def __init__(self, store: Store, job: str, write: Write) -> None:
        self._store, self._job, self._write = store, job, write
        self.attempt: Attempt | None = None
        self._piece = 0

    def read(self) -> bool:
        """Writes what is new; whether there was anything."""
        found = False
        for each in attempts(self._store, self._job)[
            self.attempt.number - 1 if self.attempt else 0 :
        ]:
            if self.attempt is None or each.number != self.attempt.number:
                self._report_end()
                self.attempt, self._piece, found = each, 0, True
                began = each.began()
                line(f"--- attempt {each.number}, on {began['cluster']}, began {began['at']}")
            for number, data in each.pieces(self._piece):
                self._write(data)
                self._piece, found = number, True
        return found

    def _report_end(self) -> None:
        if self.attempt is not None:
            ended = self.attempt.ended()
            how = f"exit code {ended['exit_code']}" if ended else "killed, without a last word"
            line(f"--- attempt {self.attempt.number} ended: {how}")


def _is_over(api: KubeApi, job: str) -> bool:
    """Also where it is gone; False while the cluster does not answer."""
    try:
        return state_of(cluster.get(api, job)).is_over
    except ClusterRefused as refused:
        if refused.status == 404:
            return True
        raise
    except ClusterError:
        return False
