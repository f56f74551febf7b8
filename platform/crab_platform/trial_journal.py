"""What was asked of each trial of a sweep and what it has shown: files, and the only state of the sweep.

    trials/00007/asked.json           the sample, written before the trial is started
    trials/00007/starts/00001.json    where and when it was started, or started again
    trials/00007/groups/GROUP.json    a placement group that it had
    trials/00007/results/00003.json   the fourth result: its metrics, and what it took
    trials/00007/failures/00001.json  why it had to be started again
    trials/00007/end.json             how it ended
    trials/00007/state/               its newest checkpoint (checkpoint.py), until it has ended

Every file is created once and never changed. A sweep that was killed is started again from them: the same samples are
asked, results that are there are shown again instead of being trained for, and so the search and the scheduler come to
know what they knew. What a trial shows depends on its sample alone, so two processes that write the same result, of
which one was thought dead, write the same.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from crab_platform.storage import AlreadyExists, Store

FOLDER = "trials"
STATE = "state"
Status = Literal["completed", "stopped", "failed", "refused", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a trial has shown after some of its steps."""

    step: int
    metrics: dict[str, float]
    seconds: float
    """Since the result before it; of the first one, since the trial began, with the making of its model."""
    node: str
    """Ray's id of the node that it was made on."""
    at: str


@dataclass(frozen=True, kw_only=True)
class Start:
    node: str
    """Ray's id; "" for a trial of several workers."""
    at: str


@dataclass(frozen=True, kw_only=True)
class Failure:
    reason: str
    at: str


@dataclass(frozen=True, kw_only=True)
class End:
    status: Status
    reason: str
    at: str


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """All that is known of a trial."""

    number: int
    config: dict[str, Any]
    """The sample."""
    asked_at: str
    starts: list[Start] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    end: End | None = None

    @property
    def status(self) -> Status:
        return self.end.status if self.end else "unfinished"

    @property
    def steps(self) -> int:
        return self.results[-1].step if self.results else 0

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.results)

    def best(self, metric: str, mode: str) -> float | None:
        """The best finite value that it has shown."""
        shown = [result.metrics.get(metric, math.nan) for result in self.results]
        values = [value for value in shown if math.isfinite(value)]
        return None if not values else (min(values) if mode == "min" else max(values))


class TrialJournal:
    """The files of one trial. Picklable."""

    def __init__(self, store: Store, number: int) -> None:
        self.store = store
        self.number = number
        self.folder = f"{FOLDER}/{number:05d}"

    @property
    def state_url(self) -> str:
        """Where its checkpoints lie."""
        return f"{self.store.url}/{self.folder}/{STATE}"

    def ask(self, config: Mapping[str, Any]) -> None:
        """Raises AlreadyExists where the number was given before."""
        self._create("asked.json", {"config": dict(config), "at": now()})

    def append(self, index: int, result: Result) -> Result:
        """Keeps the result number `index` (from 0), and returns the one that is kept: another process may have been
        there before."""
        name = f"results/{index:05d}.json"
        try:
            self._create(name, asdict(result))
        except AlreadyExists:
            return Result(**self._read(name))
        return result

    def results(self) -> list[Result]:
        """In their order."""
        found = self.store.read_all(self.store.list(f"{self.folder}/results"))
        return [Result(**json.loads(data)) for data in found]

    def start(self, node: str) -> None:
        """Keeps that the trial is worked on from now on, there."""
        self._add("starts", Start(node=node, at=now()))

    def group(self, name: str) -> None:
        """Keeps that it had a placement group of this id."""
        try:
            self._create(f"groups/{name}.json", {"at": now()})
        except AlreadyExists:
            return

    def groups(self) -> list[str]:
        """All placement groups that it ever had."""
        return [p.rpartition("/")[2][:-5] for p in self.store.list(f"{self.folder}/groups")]

    def fail(self, reason: str) -> None:
        """Keeps why the trial has to be started again."""
        self._add("failures", Failure(reason=reason, at=now()))

    def finish(self, status: Status, reason: str) -> None:
        """Keeps how it ended. The first word counts."""
        try:
            self._create("end.json", asdict(End(status=status, reason=reason, at=now())))
        except AlreadyExists:
            return

    def clear_state(self) -> None:
        """Removes its checkpoints: it has ended."""
        self.store.delete_all(self.store.list(f"{self.folder}/{STATE}"))

    def end(self) -> End | None:
        """How it ended, if it has."""
        try:
            return End(**self._read("end.json"))
        except FileNotFoundError:
            return None

    def _add(self, kind: str, entry: Start | Failure) -> None:
        """Under the next number that is free: a process that was thought dead may take one as well."""
        number = len(self.store.list(f"{self.folder}/{kind}"))
        while True:
            number += 1
            try:
                self._create(f"{kind}/{number:05d}.json", asdict(entry))
            except AlreadyExists:
                continue
            return

    def _create(self, name: str, values: Mapping[str, Any]) -> None:
        self.store.create(f"{self.folder}/{name}", json.dumps(values).encode())

    def _read(self, name: str) -> Any:
        return json.loads(self.store.read(f"{self.folder}/{name}"))


def read_trials(store: Store) -> list[TrialRecord]:
    """All trials that were asked, by number."""
    return _read(store, FOLDER)


def read_trial(store: Store, number: int) -> TrialRecord:
    """One trial that was asked."""
    (record,) = _read(store, f"{FOLDER}/{number:05d}")
    return record


def _read(store: Store, folder: str) -> list[TrialRecord]:
    paths = [p for p in store.list(folder) if p.endswith(".json") and f"/{STATE}/" not in p]
    files: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for path, data in zip(paths, store.read_all(paths), strict=True):
        _, number, name = path.split("/", 2)
        files[int(number)][name] = json.loads(data)
    return [
        TrialRecord(
            number=number,
            config=found["asked.json"]["config"],
            asked_at=found["asked.json"]["at"],
            starts=[Start(**v) for name, v in found.items() if name.startswith("starts/")],
            results=[Result(**v) for name, v in found.items() if name.startswith("results/")],
            failures=[Failure(**v) for name, v in found.items() if name.startswith("failures/")],
            end=End(**found["end.json"]) if "end.json" in found else None,
        )
        for number, found in sorted(files.items())
        if "asked.json" in found
    ]


def now() -> str:
    """The time, as the journal has it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
