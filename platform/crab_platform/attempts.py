"""What a job on a cluster leaves in the bucket: its attempts, each with its log, while it runs and after its cluster is
gone.

    jobs/JOB/0001/began.json          who claimed it: created once, so two attempts never have one number
    jobs/JOB/0001/log/00000001        the next piece of its output, every few seconds
    jobs/JOB/0001/logs.zip            Ray's own logs of the head, at the end
    jobs/JOB/0001/ended.json          exit code, times, result; absent when it was killed

KubeRay may start the next attempt while the one before still runs (its #5211). An attempt that sees a higher number is
superseded and has to end: `is_superseded`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from crab_platform.storage import AlreadyExists, Store

_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a job, on one Ray cluster."""

    store: Store
    job: str
    number: int
    """From 1."""

    @property
    def folder(self) -> str:
        return f"jobs/{self.job}/{self.number:04}"

    @property
    def is_superseded(self) -> bool:
        """Whether a later attempt has begun. Raises StoreUnreachable."""
        return self.store.exists(f"jobs/{self.job}/{self.number + 1:04}/began.json")

    def began(self) -> dict[str, Any]:
        return dict(json.loads(self.store.read(f"{self.folder}/began.json")))

    def ended(self) -> dict[str, Any] | None:
        """None while it runs, and for ever where it was killed."""
        try:
            return dict(json.loads(self.store.read(f"{self.folder}/ended.json")))
        except FileNotFoundError:
            return None

    def end(self, record: Mapping[str, Any]) -> None:
        self.store.create(f"{self.folder}/ended.json", json.dumps(record).encode())

    def keep(self, name: str, data: bytes) -> None:
        """A file beside the log."""
        self.store.create(f"{self.folder}/{name}", data)

    def write_piece(self, number: int, data: bytes) -> None:
        """The next piece of the log, from 1. A piece that is there already stays: it is ours, from a lost answer."""
        try:
            self.store.create(self._piece(number), data)
        except AlreadyExists:
            return

    def pieces(self, after: int = 0) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of all pieces of the log after a number that are there now."""
        number = after + 1
        while True:
            try:
                data = self.store.read(self._piece(number))
            except FileNotFoundError:
                return
            yield number, data
            number += 1

    def _piece(self, number: int) -> str:
        return f"{self.folder}/log/{number:0{_DIGITS}}"


def claim(store: Store, job: str, record: Mapping[str, Any]) -> Attempt:
    """Begins the next attempt of a job; those before it are superseded. Raises StoreUnreachable."""
    data = json.dumps(record).encode()
    number = 1
    while True:
        attempt = Attempt(store=store, job=job, number=number)
        try:
            store.create(f"{attempt.folder}/began.json", data)
        except AlreadyExists:
            number += 1
            continue
        return attempt


def attempts(store: Store, job: str) -> list[Attempt]:
    """All attempts of a job so far, the first one first; none where it has not begun."""
    found: list[Attempt] = []
    while store.exists(f"jobs/{job}/{len(found) + 1:04}/began.json"):
        found.append(Attempt(store=store, job=job, number=len(found) + 1))
    return found
