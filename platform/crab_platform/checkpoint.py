"""Checkpoints of a training run: whole or not there, found by looking, the same for any number of workers.

A checkpoint is a folder `checkpoint_STEP_ID/` below the run's: `state-*.safetensors` with what is trained and Adam's
moments in full (engine_state.py), and `complete.json`, which is written last and says the step, what must fit, the size
and BLAKE3 of every file, and its own. Without it, or with a file that is not what it says, the folder is no checkpoint.
The folders are the only state: DeepSpeed's `latest` is published before all ranks are done, and Ray Train's list is
rewritten in place; neither is used.

Files are created once and never changed, in a folder or on S3 (storage.py), so a kill at any moment leaves whole files
and no marker. Ray Train refuses to start with a torn list of its own (`checkpoint_manager_snapshot.json`); `mend`
removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from crab_platform.engine_state import shape_of, trained
from crab_platform.storage import FolderStore, Store

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint_(\d{8,})_[0-9a-f]+")
_SNAPSHOT = "checkpoint_manager_snapshot.json"
_OF_BEFORE = "complete-0.json"
"""The marker of checkpoints that DeepSpeed wrote, a file a rank, before version 2."""
COMPLETE = "complete.json"
SCHEMA = 2
_SEAL = b', "blake3": "'
FILE_BYTES = 256 << 20
"""So much of the state goes into one file, which is once more in memory while it is written or read."""


class IncompleteCheckpointError(ValueError):
    """A folder is not a whole checkpoint; says which file is missing or wrong."""


class CheckpointMismatchError(ValueError):
    """A whole checkpoint was written by another kind of run than the one that wants it."""


class DataChangedError(CheckpointMismatchError):
    """The samples or features are no longer those that the checkpoint has learnt from."""


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What `complete.json` says."""

    step: int
    """Optimizer steps that were done."""
    adam_step: int
    """Of them, those that changed the weights."""
    layout: dict[str, Any]
    """What must be the same for a checkpoint to fit, see `layout`."""
    data: str
    """Digest of what is learnt from."""
    guard: dict[str, Any]
    """What the guard of the run has seen."""
    metrics: dict[str, float]
    """Of the last step."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> (bytes, BLAKE3)."""
    schema: int = SCHEMA


def new_name(step: int) -> str:
    """A folder name that no other checkpoint has, also not one of the same step that was lost before."""
    return f"checkpoint_{step:08d}_{uuid.uuid4().hex[:8]}"


def layout(model: torch.nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: `settings`, and names and shapes of what is trained."""
    shapes = [(name, shape_of(parameter)) for name, parameter in trained(model).items()]
    return dict(settings) | {
        "trained": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    }


def write(store: Store, name: str, state: Mapping[str, Tensor], marker: Marker) -> None:
    """Writes a checkpoint into the folder `name`, which must be new. The marker's own `files` do not count.

    Raises StoreError, AlreadyExists among them.
    """
    from safetensors.torch import save

    files: dict[str, tuple[int, str]] = {}
    parts = list(_parts(state))
    for number, part in enumerate(parts, 1):
        file = f"state-{number:05d}-of-{len(parts):05d}.safetensors"
        data = save({key: state[key].contiguous() for key in part})
        store.create(f"{name}/{file}", data)
        files[file] = (len(data), blake3(data, max_threads=blake3.AUTO).hexdigest())
    store.create(f"{name}/{COMPLETE}", _seal(asdict(marker) | {"files": files}))


def _seal(fields: Mapping[str, Any]) -> bytes:
    """JSON whose last field is the BLAKE3 of all that is before it, so that no byte of it can change unseen."""
    body = json.dumps(fields).encode()
    return body[:-1] + _SEAL + blake3(body).hexdigest().encode() + b'"}'


def _unseal(data: bytes) -> Any:
    """What was sealed. Raises ValueError."""
    body, seal, digest = data.rpartition(_SEAL)
    body += b"}"
    if not seal or digest != blake3(body).hexdigest().encode() + b'"}':
        raise ValueError("it has other bytes than were written")
    return json.loads(body)


def read(store: Store, name: str) -> tuple[Marker, dict[str, Tensor]]:
    """A checkpoint, every byte checked. Raises IncompleteCheckpointError for anything but a whole one."""
    from safetensors.torch import load

    marker = read_marker(store, name)
    state: dict[str, Tensor] = {}
    for file, (size, digest) in marker.files.items():
        try:
            data = store.read(f"{name}/{file}")
        except FileNotFoundError:
            raise IncompleteCheckpointError(f"{file} is missing") from None
        if len(data) != size:
            raise IncompleteCheckpointError(f"{file} has {len(data)} bytes, {size} were written")
        if blake3(data, max_threads=blake3.AUTO).hexdigest() != digest:
            raise IncompleteCheckpointError(f"{file} has other bytes than were written")
        state |= load(data)
    return marker, state


def read_marker(store: Store, name: str) -> Marker:
    """What a checkpoint says of itself. Raises IncompleteCheckpointError where it does not say it."""
    try:
        fields = _unseal(store.read(f"{name}/{COMPLETE}"))
    except FileNotFoundError:
        raise IncompleteCheckpointError(
            f"{COMPLETE} is missing: it was not written to its end"
        ) from None
    except ValueError as error:
        raise IncompleteCheckpointError(f"{COMPLETE} is damaged: {error}") from error
    if fields["schema"] != SCHEMA:
        raise CheckpointMismatchError(
            f"{store.url}/{name} has schema {fields['schema']}, this version reads {SCHEMA}; "
            "go on with the version that wrote it"
        )
    files = {file: (int(size), str(digest)) for file, (size, digest) in fields["files"].items()}
    marker = Marker(**(fields | {"files": files}))
    if int(name.split("_")[1]) != marker.step:
        raise IncompleteCheckpointError(f"{COMPLETE} is of step {marker.step}, not of this folder")
    return marker


def newest(
    store: Store, expected: Mapping[str, Any], data: str, *, changed_data: bool = False
) -> tuple[str, Marker] | None:
    """The newest whole checkpoint of a run and what it says, or None. Those that are not whole are named in the log.

    Raises:
        CheckpointMismatchError: it was written by a run of another layout.
        DataChangedError: it has learnt from other data, and `changed_data` does not allow that.
    """
    for name in reversed(names(store)):
        try:
            marker, _ = read(store, name)
        except IncompleteCheckpointError as error:
            if store.exists(f"{name}/{_OF_BEFORE}"):
                raise CheckpointMismatchError(
                    f"{store.url}/{name} was written by an earlier version, which can go on with it. "
                    f"To start again from step 0, remove {store.url}"
                ) from error
            _LOG.warning("%s/%s is not used: %s; trying the one before it", store.url, name, error)
            continue
        if marker.layout != dict(expected):
            raise CheckpointMismatchError(
                f"{store.url}/{name} was written with {_difference(marker.layout, expected)}. "
                f"Go back to what it was written with, or remove {store.url} to start again from step 0"
            )
        if marker.data != data:
            if not changed_data:
                raise DataChangedError(
                    f"the data has changed since {store.url}/{name} (step {marker.step}): {marker.data[:12]}, now "
                    f"{data[:12]}. Bring it back; or go on with the new data (--set workers.changed_data=continue); or "
                    "give the run another name"
                )
            _LOG.warning(
                "%s/%s has learnt from data %s; going on with %s, as changed_data allows",
                *(store.url, name, marker.data[:12], data[:12]),
            )
        return name, marker
    return None


def names(store: Store) -> list[str]:
    """Names of the checkpoint folders of a run, whole or not, oldest first."""
    folders = {path.partition("/")[0] for path in store.list()}
    matches = [match for name in folders if (match := _NAME.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda m: (int(m[1]), m[0]))]


def take_over(source: Store, step: int, target: Store) -> None:
    """Copies the checkpoint of this step from another run into one that has none yet.

    Raises IncompleteCheckpointError where there is no whole one of that step.
    """
    if any(target.exists(f"{name}/{COMPLETE}") for name in names(target)):
        return
    for name in reversed(names(source)):
        if int(name.split("_")[1]) == step and source.exists(f"{name}/{COMPLETE}"):
            marker, state = read(source, name)
            write(target, new_name(step), state, marker)
            return
    raise IncompleteCheckpointError(f"{source.url} has no checkpoint of step {step} to go on from")


def remove_unusable(store: Store, used: str | None) -> None:
    """Deletes what `newest` has passed over: all that is newer than `used`, and what was not written to its end."""
    for name in names(store):
        if used is None or name > used or (name != used and not store.exists(f"{name}/{COMPLETE}")):
            _LOG.warning("removing %s/%s, which cannot be used", store.url, name)
            remove(store, [name])


def remove(store: Store, unwanted: Sequence[str]) -> None:
    """Deletes checkpoints, the marker first: what is left by a kill is no checkpoint."""
    for name in unwanted:
        store.delete(f"{name}/{COMPLETE}")
        store.delete_all(store.list(name))
        if isinstance(store, FolderStore):
            with suppress(FileNotFoundError):  # two attempts of one run may remove the same
                Path(store.url, name).rmdir()


def mend(store: Store) -> None:
    """Removes Ray Train's list of checkpoints if it is torn: it would refuse to start.

    To be called before the run is started, while nothing else writes below it.
    """
    try:
        json.loads(store.read(_SNAPSHOT))
    except FileNotFoundError:
        return
    except ValueError as error:
        _LOG.warning("%s/%s is damaged (%s); removing it", store.url, _SNAPSHOT, error)
        store.delete(_SNAPSHOT)


def _parts(state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, as many a part as fit into FILE_BYTES, one at least."""
    part: list[str] = []
    size = 0
    for key in sorted(state):
        nbytes = state[key].numel() * state[key].element_size()
        if part and size + nbytes > FILE_BYTES:
            yield part
            part, size = [], 0
        part.append(key)
        size += nbytes
    if part:
        yield part


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {before.get(key)!r} (now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )
