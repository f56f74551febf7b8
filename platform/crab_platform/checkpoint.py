"""Checkpoints of a training run: written by every rank, believed only when whole, found by looking.

The folders are the only state. A checkpoint is `checkpoint_STEP_ID/` below the run's folder: DeepSpeed's files of
every rank, and from every rank `complete-RANK.json` with the size and BLAKE3 of each file that it wrote. Ranks upload
on their own and a kill may come at any moment, so a folder counts as a checkpoint only if all markers are there and
all files are what the markers say; the order of the uploads does not matter. DeepSpeed's own `latest` is published
before all ranks are done and is not written at all.

Ray Train keeps a list of its own (`checkpoint_manager_snapshot.json`), which it rewrites in place and refuses to read
when torn. It serves to delete old checkpoints and for nothing else; `mend` removes it where it cannot be used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blake3
import torch

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint_(\d{8,})_[0-9a-f]+")
_TAG = "state"
_SNAPSHOT = "checkpoint_manager_snapshot.json"


class IncompleteCheckpointError(ValueError):
    """A folder is not a whole checkpoint; says which file is missing or wrong."""


class CheckpointMismatchError(ValueError):
    """A whole checkpoint was written by another kind of run than the one that wants it."""


def new_name(step: int) -> str:
    """A folder name that no other checkpoint has, also not one of the same step that was lost before."""
    return f"checkpoint_{step:08d}_{uuid.uuid4().hex[:8]}"


def layout(model: torch.nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a checkpoint to fit: `settings`, and names and shapes of what is trained."""
    shapes = [
        (name, list(getattr(p, "ds_shape", p.shape)))  # ZeRO-3 leaves p itself empty
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    return dict(settings) | {
        "trained": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    }


def save(engine: Any, folder: Path, step: int, rank: int, layout: Mapping[str, Any]) -> None:
    """Writes this rank's part of a checkpoint to an empty folder. Every rank calls it, each with its own folder."""
    engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True, save_latest=False)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    marker = {"step": step, "rank": rank, "layout": dict(layout), "files": files}
    (folder / f"complete-{rank}.json").write_text(json.dumps(marker))


def completed_step(folder: Path) -> int:
    """The step of a whole checkpoint. Raises IncompleteCheckpointError."""
    return int(_verified(folder)["step"])


def resume(engine: Any, run: str, rank: int, layout: Mapping[str, Any]) -> int:
    """Loads the newest whole checkpoint below `run` (path or URL) and returns its step; 0 when there is none.

    Called by every rank. Rank 0 looks, the others follow it; it also removes what killed runs left half written.

    Raises:
        CheckpointMismatchError: the newest one is of a run with other workers or other trained parameters.
    """
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    filesystem, folder = _filesystem(run)
    found = _newest(filesystem, folder, layout) if rank == 0 else None
    found = broadcast_from_rank_zero(found)
    step = 0
    if found is not None:
        name, step = found
        checkpoint = ray.train.Checkpoint(path=f"{folder}/{name}", filesystem=filesystem)
        with checkpoint.as_directory() as local:
            # Not strict: frozen parameters are not in it. That all trained ones are was checked by the layout.
            loaded, _ = engine.load_checkpoint(local, tag=_TAG, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed could not load checkpoint {run}/{name}; remove it")
        _LOG.info("resumed at step %d from %s", step, name)
    if rank == 0:
        known = {c.checkpoint.path for c in ray.train.get_all_reported_checkpoints()}
        for name in _names(filesystem, folder):
            if f"{folder}/{name}" not in known and (found is None or name != found[0]):
                _LOG.warning("removing %s, left by a run that was killed", name)
                filesystem.delete_dir(f"{folder}/{name}")
    return step


def mend(run: str) -> None:
    """Removes Ray Train's list of checkpoints if it is torn or names folders that are gone: it would refuse to start.

    To be called before the run is started, while nothing else writes below `run` (path or URL).
    """
    from pyarrow.fs import FileType

    filesystem, folder = _filesystem(run)
    path = f"{folder}/{_SNAPSHOT}"
    if filesystem.get_file_info(path).type == FileType.NotFound:
        return
    with filesystem.open_input_stream(path) as stream:
        text = stream.read()
    try:
        listed = {entry["checkpoint_dir_name"] for entry in json.loads(text)["checkpoint_results"]}
    except (ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s is damaged (%s); removing it, the checkpoints stay", path, error)
    else:
        gone = listed.difference(_names(filesystem, folder))
        if not gone:
            return
        _LOG.warning("%s names %s, which is gone; removing the list", path, sorted(gone))
    filesystem.delete_file(path)


def gather_trained(model: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Trained parameters in full, on the CPU, by name; on rank 0, and nothing on the others. Every rank calls it.

    Raises:
        RuntimeError: a tensor came out empty, as ZeRO-3's ungathered ones are.
    """
    import deepspeed

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters([p for _, p in trained]):
        state = {name: p.detach().to("cpu", copy=True) for name, p in trained} if rank == 0 else {}
    empty = sorted(name for name, value in state.items() if value.numel() == 0)
    if empty:
        raise RuntimeError(f"ZeRO-3 gave empty tensors for {empty[:5]}: nothing was exported")
    return state


def _newest(filesystem: Any, folder: str, layout: Mapping[str, Any]) -> tuple[str, int] | None:
    import ray.train

    for name in reversed(_names(filesystem, folder)):
        checkpoint = ray.train.Checkpoint(path=f"{folder}/{name}", filesystem=filesystem)
        with checkpoint.as_directory() as local:
            try:
                marker = _verified(Path(local))
            except IncompleteCheckpointError as error:
                _LOG.warning("%s/%s is not used: %s; trying the one before it", folder, name, error)
                continue
        if marker["layout"] != layout:
            raise CheckpointMismatchError(
                f"{folder}/{name} was written with {_difference(marker['layout'], layout)}. "
                f"Go back to what it was written with, or remove {folder} to start again from step 0"
            )
        return name, int(marker["step"])
    return None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {before.get(key)!r} (now {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    )


def _verified(folder: Path) -> dict[str, Any]:
    """The marker of rank 0, once every file of every rank was found to be what its rank wrote."""
    first = _marker(folder, 0)
    for rank in range(first["layout"]["world_size"]):
        marker = _marker(folder, rank)
        if (marker["step"], marker["layout"]) != (first["step"], first["layout"]):
            raise IncompleteCheckpointError(
                f"complete-{rank}.json is of another save than that of rank 0"
            )
        for name, (size, digest) in marker["files"].items():
            path = folder / name
            if not path.is_file():
                raise IncompleteCheckpointError(f"{name} is missing")
            if path.stat().st_size != size:
                raise IncompleteCheckpointError(
                    f"{name} has {path.stat().st_size} bytes, {size} were written"
                )
            if _digest(path) != digest:
                raise IncompleteCheckpointError(f"{name} has other bytes than were written")
    return first


def _marker(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"complete-{rank}.json"
    try:
        marker: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise IncompleteCheckpointError(
            f"{path.name} is missing: rank {rank} did not finish"
        ) from None
    except ValueError as error:
        raise IncompleteCheckpointError(f"{path.name} is damaged: {error}") from error
    if not marker.keys() >= {"step", "layout", "files"} or "world_size" not in marker["layout"]:
        raise IncompleteCheckpointError(f"{path.name} has only {sorted(marker)}")
    return marker


def _digest(path: Path) -> str:
    hasher = blake3.blake3()
    hasher.update_mmap(path)
    return hasher.hexdigest()


def _names(filesystem: Any, folder: str) -> list[str]:
    """Names of the checkpoint folders below `folder`, whole or not, oldest first."""
    from pyarrow.fs import FileSelector, FileType

    entries = filesystem.get_file_info(FileSelector(folder, allow_not_found=True))
    names = [e.base_name for e in entries if e.type == FileType.Directory]
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda m: (int(m[1]), m[0]))]


def _filesystem(run: str) -> tuple[Any, str]:
    """As Ray Train itself opens a storage path."""
    from pyarrow.fs import FileSystem

    filesystem, path = FileSystem.from_uri(run)
    return filesystem, path.rstrip("/")
