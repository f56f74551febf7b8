"""MLflow: one run a job, with the resolved spec, the git commit, the manifest as data set, metrics and files.

A server is never waited for: what a job logs goes to a spool on disk (crab_platform.spool), and a process beside the
job brings it there (crab_platform.delivery). A sqlite file cannot be down and is written to directly.

Explicit ids through MlflowClient throughout: the fluent API keeps an active run in a global, which other processes
override by environment variables.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from crab_platform.own_cost import CURRENCY_VARIABLE, cost_till_now
from crab_platform.spool import FOLDER, Cursor, Record, Spool, load_cursor

_PARAM_LENGTH = 6000
"""MLflow refuses longer parameter values; the whole spec is kept as a file as well."""
_SQLITE = "sqlite:"

START_LIMIT_S = 10.0
"""So long a job waits for the server's name of its run, importing MLflow included; it goes on at the first trouble."""
END_LIMIT_S = 5.0
"""So long a job waits at its end for a server that is in trouble."""
SILENT_LIMIT_S = 8.0
"""So long for one of which nothing is known, while no file is on its way."""

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go."""

    def append(self, record: Record) -> None:
        """Takes one record."""

    def keep(self, path: Path) -> Path:
        """Where a file or folder can be read later."""


class Direct:
    """Records are done at once, and errors raised: for a sqlite file."""

    def __init__(self, tracking_uri: str, run_id: str | None = None) -> None:
        from crab_platform.mlflow_records import Records

        self.records = Records(tracking_uri, run_id)

    def append(self, record: Record) -> None:
        """Does what it says."""
        self.records.apply([record])

    def keep(self, path: Path) -> Path:
        """The path itself: it is read now."""
        return path


class Run:
    """One MLflow run that is being written. Picklable: holds the URI, the ids and the path of the spool only.

    `run_id` is the server's name of the run. When the server did not answer at the start it is one of our own, which
    the run carries in its tag `crab.run` once it is there.
    """

    def __init__(
        self, tracking_uri: str, experiment: str, run_id: str, spool: Path | None = None
    ) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self.run_id = run_id
        self.spool = spool
        self._sink: Sink | None = None

    def __reduce__(self) -> tuple[type[Run], tuple[str, str, str, Path | None]]:
        return (Run, (self.tracking_uri, self.experiment, self.run_id, self.spool))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Logs metrics of one step; `/` groups them in MLflow's pages. The first value of a step counts."""
        floats = {name: float(value) for name, value in values.items()}
        self._log({"op": "metrics", "time": _now_ms(), "step": step, "values": floats})

    def dataset(self, name: str, digest: str, url: str) -> None:
        """Logs a manifest as input of the run, by its digest; no data is read."""
        self._log({"op": "dataset", "name": name, "digest": digest, "url": url})

    def file(self, path: str | Path, folder: str | None = None) -> None:
        """Copies a file, or a folder with all its files, to the artefacts of the run."""
        kept = self._open().keep(Path(path))
        self._log({"op": "file", "path": str(kept), "folder": folder})

    def model(self, name: str, path: str | Path, params: Mapping[str, str], step: int = 0) -> None:
        """Copies a folder as a model of the run (MLflow's LoggedModel), with what it was made with."""
        kept = self._open().keep(Path(path))
        record = {"op": "model", "name": name, "path": str(kept), "type": "adapter", "step": step}
        self._log(record | {"params": {key: str(value) for key, value in params.items()}})

    def tag(self, name: str, value: str) -> None:
        """Sets a tag of the run."""
        self._log({"op": "tag", "name": name, "value": value})

    def _log(self, record: Record) -> None:
        self._open().append(record)

    def _open(self) -> Sink:
        if self._sink is None:
            self._sink = Spool(self.spool) if self.spool else Direct(self.tracking_uri, self.run_id)
        return self._sink


@contextmanager
def start_run(
    tracking_uri: str,
    experiment: str,
    name: str,
    *,
    spec: Mapping[str, Any],
    tags: Mapping[str, str] | None = None,
    folder: Path | None = None,
    resume: str | None = None,
    resume_finished: bool = False,
) -> Iterator[Run]:
    """A run for the length of the block: FINISHED at its end, FAILED when it raises, KILLED on Ctrl-C.

    Args:
        tracking_uri: `sqlite:///FILE`, or the URL of a server, which need not be up.
        experiment: made when it is not there.
        name: shown by MLflow; need not be unique.
        spec: becomes the parameters, and spec.yaml.
        tags: of the run.
        folder: of the job; the spool lies below it. Else work/runs/NAME.
        resume: what is trained, as a digest: the newest run of the experiment with this tag `identity` that is not
            FINISHED is continued, and steps that it has are not logged again. Without one, a new run gets the tag.
        resume_finished: also one that is FINISHED: of this identity there is one run and never another.
    """
    if resume is not None and not re.fullmatch(r"[\w.:-]+", resume):
        raise ValueError(f"resume is {resume!r}; expected letters, digits and any of . : _ -")
    commit, dirty = git_commit()
    own = {"git.commit": commit, "git.dirty": str(dirty).lower()}
    if resume is not None:
        own["identity"] = resume
    local_id = uuid.uuid4().hex
    first = {
        "op": "run",
        "uri": tracking_uri,
        "id": local_id,
        "experiment": experiment,
        "artifacts": _artifacts(tracking_uri),
        "name": name,
        "tags": own | dict(tags or {}),
        "resume": resume,
        "resume_finished": resume_finished,
        "time": _now_ms(),
    }
    if tracking_uri.startswith(_SQLITE):
        direct = Direct(tracking_uri)
        direct.append(first)
        run = Run(tracking_uri, experiment, str(direct.records.run_id))
        run._sink = direct
        with _logged(run, spec, tags or {}):
            yield run
        return
    place = folder or Path("work/runs") / re.sub(r"[^\w.-]", "-", name)
    spool = Spool.create((place / FOLDER).absolute(), first)
    courier = _Courier(spool, tracking_uri)
    try:
        run = Run(tracking_uri, experiment, courier.run_id() or local_id, spool.path)
        run._sink = spool
        with _logged(run, spec, tags or {}):
            yield run
    finally:
        spool.close()
        courier.end()


@contextmanager
def _logged(run: Run, spec: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[None]:
    """The spec before the block, and how it ended, and what it cost, after it."""
    began = time.monotonic()
    params = {plain_name(key): value[:_PARAM_LENGTH] for key, value in flatten(spec).items()}
    status = "FAILED"
    try:
        run._log({"op": "params", "values": params})
        run._log({"op": "text", "name": "spec.yaml", "values": dict(spec)})
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        # Runs inside a run (trials) share its pods. The step tells attempts apart: of one step the first value counts.
        if "mlflow.parentRunId" not in tags and (cost := cost_till_now(began)):
            run.metrics(cost, step=int(time.time()))
            run.tag("cost.currency", os.environ.get(CURRENCY_VARIABLE, ""))
        run._log({"op": "end", "status": status, "time": _now_ms()})


class _Courier:
    """The process that brings a spool to its server while the job goes on."""

    def __init__(self, spool: Spool, tracking_uri: str) -> None:
        self._path = spool.path
        self._uri = tracking_uri
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._path.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "crab_platform.delivery", str(self._path), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the job; its end has still to be told
            )

    def run_id(self) -> str | None:
        """The server's name of the run; None when the server does not give one soon."""
        limit = time.monotonic() + START_LIMIT_S
        cursor = Cursor()
        while time.monotonic() < limit and self._process.poll() is None:
            cursor = load_cursor(self._path)
            if cursor.run_id or cursor.trouble:
                break
            time.sleep(0.02)
        if not cursor.run_id:
            _logger.warning(
                "MLflow at %s does not answer (%s). The job goes on; what it logs is kept in %s and sent when the "
                "server is there",
                _public(self._uri),
                _short(cursor.trouble),
                self._path.parent,
            )
        return cursor.run_id

    def end(self) -> None:
        """Waits while the rest is on its way, but not for a server that is in trouble."""
        if self._process.poll() is not None and self._path.exists():
            self._process = self._start()  # it died, for want of memory perhaps
        cursor = Cursor()
        began = moved = time.monotonic()
        while self._process.poll() is None:
            seen = load_cursor(self._path)
            if seen.offset != cursor.offset or (seen.busy and not seen.trouble):
                moved = time.monotonic()
            cursor = seen
            now = time.monotonic()
            in_trouble = bool(cursor.trouble) and now - began > END_LIMIT_S
            if in_trouble or now - moved > SILENT_LIMIT_S:
                self._process.send_signal(signal.SIGKILL)  # it may be killed at any moment
                self._process.wait()
            time.sleep(0.02)
        if self._path.exists():
            _logger.warning(
                "MLflow at %s has not taken all of this run (%s). It is kept; once the server answers: crab replay %s",
                _public(self._uri),
                _short(cursor.trouble),
                self._path.parent.parent,
            )


def _short(trouble: str) -> str:
    return _public(trouble)[:200] or "no answer yet"


def _public(text: str) -> str:
    """Without the user and password that an address may hold."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _artifacts(tracking_uri: str) -> str | None:
    """Where files of runs go: beside a sqlite file (MLflow would take the current folder), else as the server says."""
    prefix = "sqlite:///"
    if not tracking_uri.startswith(prefix):
        return None
    database = Path(tracking_uri.removeprefix(prefix))
    database.parent.mkdir(parents=True, exist_ok=True)
    return (database.parent / "mlartifacts").absolute().as_uri()


def plain_name(name: str) -> str:
    """A name that MLflow takes for a parameter or metric: `n=1` becomes `n_1`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names: {"a": {"b": 1}} -> {"a.b": "1"}; lists are written as they print."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def git_commit() -> tuple[str, bool]:
    """(commit of the working tree we run from, whether it has uncommitted changes); ("unknown", False) outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False
