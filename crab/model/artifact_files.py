"""Is an exported folder what training wrote? A digest for every file, and tensors that can be weights.

`digests.json` is written last: {path in the folder: SHA-256}. Files that it does not name are not looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

DIGESTS = "digests.json"
_NEXT = (
    "Take the folder from where it was copied, or start the train job again (crab run): it exports once more from its "
    "last checkpoint"
)


class DamagedExportError(ValueError):
    """A file of an exported adapter is absent, or not what training wrote; says which one and what to do."""


def write_digests(folder: Path) -> None:
    """Writes digests.json over all that lies in `folder` now."""
    text = json.dumps(_digests(folder, _files(folder)), indent=2)
    (folder / DIGESTS).write_text(text + "\n")


def check_digests(folder: Path) -> None:
    """Raises DamagedExportError where digests.json, or a file that it names, is absent or damaged."""
    where = folder / DIGESTS
    try:
        expected = json.loads(where.read_bytes())
    except FileNotFoundError:
        raise DamagedExportError(f"{where} is absent: the export is not whole. {_NEXT}") from None
    except ValueError as error:
        raise DamagedExportError(f"{where} is damaged ({error}). {_NEXT}") from None
    if not isinstance(expected, dict) or not expected:
        raise DamagedExportError(f"{where} is damaged: it names no files. {_NEXT}")
    if absent := [name for name in expected if not (folder / name).is_file()]:
        raise DamagedExportError(f"{folder / absent[0]} is absent. {_NEXT}")
    found = _digests(folder, expected)
    if wrong := [name for name in expected if found[name] != expected[name]]:
        size = (folder / wrong[0]).stat().st_size
        raise DamagedExportError(
            f"{folder / wrong[0]} ({size} bytes) is not the file that training wrote: its SHA-256 is "
            f"{found[wrong[0]][:12]}, {DIGESTS} says {str(expected[wrong[0]])[:12]}. {_NEXT}"
        )


def check_weights(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises DamagedExportError where `file` gave no tensor with elements, or NaN or infinity in one.

    Digests do not tell this: an export of shards that nobody gathered has good ones.
    """
    if not tensors:
        raise DamagedExportError(f"{file} holds no tensors. {_NEXT}")
    if empty := [name for name, tensor in tensors.items() if tensor.numel() == 0]:
        raise DamagedExportError(
            f"{file}: {len(empty)} tensors have no elements, first {empty[0]}: they were saved from a model that "
            "ZeRO-3 had sharded. Gather them before saving (crab.model.artifact.save_model takes no such ones)"
        )
    if wild := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise DamagedExportError(
            f"{file}: {len(wild)} tensors have NaN or infinity, first {wild[0]}. Go back to a checkpoint from before"
        )


def _files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != DIGESTS)


def _digests(folder: Path, names: list[str] | dict[str, str]) -> dict[str, str]:
    digests = {}
    for name in names:
        with (folder / name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
