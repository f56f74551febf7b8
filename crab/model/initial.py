"""First values of what is trained, from an earlier training: projectors, times, mask decoder, rows of the added tokens.

A folder with two files: `initial.safetensors`, tensors under the names that they have in CrabModel, and
`initial.sha256`, the digest of the former. The digest is checked whenever the values are read, so that a damaged or an
exchanged file is never trained on.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crab.model.crab_model import CrabModel

FILE = "initial.safetensors"
DIGEST = "initial.sha256"
PARTS = (
    "video_projector",
    "audio_projector",
    "time_embedding",
    "mask_decoder",
    "new_embedding",
    "new_head",
)


def save_initial(
    tensors: Mapping[str, Tensor], folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> str:
    """Write values (CrabModel's names, any of PARTS) for `load_initial`; returns their digest. float16 halves the file.

    Raises:
        ValueError: no tensors, or one that belongs to no such part.
    """
    strange = [name for name in tensors if name.split(".")[0] not in PARTS]
    if strange or not tensors:
        raise ValueError(f"first values are tensors of {PARTS}, got {strange[:3] or 'none'}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    save_file(state, target / FILE)
    digest = _file_digest(target / FILE)
    (target / DIGEST).write_text(digest + "\n")
    return digest


@torch.no_grad()
def load_initial(model: CrabModel, folder: str | Path) -> str:
    """Copy the values into the model's parameters, all or nothing; returns their digest. Those not named keep theirs.

    Raises:
        FileNotFoundError: there is no such folder, or one of its two files is absent.
        ValueError: the file is not the one that the digest is of, or its names or shapes do not fit the model.
    """
    source = Path(folder)
    for name in (FILE, DIGEST):
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{source / name} is not there; config.initial needs a folder with {FILE} and {DIGEST}"
            )
    expected, found = (source / DIGEST).read_text().strip(), _file_digest(source / FILE)
    if expected != found:
        raise ValueError(
            f"{source / FILE} has the digest {found}, {DIGEST} says {expected}; fetch the folder again"
        )
    state = load_file(source / FILE)
    own = {n: p for n, p in model.named_parameters() if n.split(".")[0] in PARTS}
    wrong = [n for n in sorted(state) if n not in own or own[n].shape != state[n].shape]
    if wrong:
        raise ValueError(
            f"{source / FILE} does not fit this model: {len(wrong)} tensors are unknown or of another shape, first "
            f"{wrong[:3]}; use the config that it was trained with"
        )
    for name, tensor in state.items():
        own[name].copy_(tensor)
    return found


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
