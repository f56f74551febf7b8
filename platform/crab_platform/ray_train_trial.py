"""A trial of several workers: a run of Ray Train with ZeRO (training.py), in a thread of the trial's process.

Ray Tune may end such a process at any time, and then Ray Train's workers keep their CPUs and GPUs: their placement
group belongs to a controller that is gone too. So every group is told to the sweep (trial_journal.py), which looks
after it (reaper.py). An early stop lets the run end by itself after the step that it is in.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from crab_platform import checkpoint
from crab_platform.storage import open_store
from crab_platform.training import Stopped, train
from crab_platform.trial import NUMBER, JournaledTrial, TrialPlan
from crab_platform.trial_journal import STATE, Result

_END_S = 120.0
"""So long a run may take to end after a step, with a checkpoint."""


class RayTrainTrial(JournaledTrial):
    """Shows what a run of Ray Train tells."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:  # type: ignore[override]  # by with_parameters
        self._thread: threading.Thread | None = None
        super().setup(config, plan)

    def _open(self, config: dict[str, Any]) -> None:
        self.cleanup()
        super()._open(config)

    def _node(self) -> str:
        return ""

    def _prepare(self, sample: Mapping[str, Any], known: Sequence[Result]) -> None:
        self._told: queue.Queue[dict[str, float] | BaseException | None] = queue.Queue()
        self._stop = threading.Event()
        plan, journal = self._plan, self._journal
        self._own_state()
        config = replace(
            plan.training,
            name=STATE,
            storage_path=f"{journal.store.url}/{journal.folder}",
            validate_every=plan.report_every,
            checkpoint_every=plan.report_every,
            stop_after=self._ends_at,
            max_failures=0,  # Ray Tune counts them
        )
        build = partial(plan.build, {NUMBER: journal.number, **sample}, None)

        def work() -> None:
            try:
                train(build, config, self._told.put, stop=self._stop, on_group=journal.group)
            except Stopped:
                self._told.put(None)
            except BaseException as error:  # told to the trial's own thread
                self._told.put(error)
            else:
                self._told.put(None)

        self._thread = threading.Thread(target=work, name="ray-train", daemon=True)
        self._thread.start()

    def _train_to(self, step: int) -> dict[str, float]:
        store = open_store(self._journal.state_url)
        for name in reversed(checkpoint.names(store)):
            # A checkpoint of this step whose result was lost: the run goes on after it, and tells it to nobody.
            if int(name.split("_")[1]) == step and store.exists(f"{name}/{checkpoint.COMPLETE}"):
                return checkpoint.read_marker(store, name).metrics
        while True:
            told = self._told.get()
            if told is None:
                raise RuntimeError(f"the run ended before step {step}")
            if isinstance(told, BaseException):
                raise told
            if told["step"] == step:
                if step == self._ends_at:
                    self._await_end()
                return told

    def _await_end(self) -> None:
        """The checkpoint of the last step is written then: others may go on from it. Raises what the run raised."""
        while (told := self._told.get()) is not None:
            if isinstance(told, BaseException):
                raise told

    def cleanup(self) -> None:
        """Ends the run that is under way, after its step."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join(_END_S)
