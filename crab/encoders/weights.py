"""Where weights lie, and how they are read: safetensors folders, nothing that can run code.

A pickle executes what its author wrote in it, so pickles are refused. The one exception is BEATs,
which its authors publish as `.pt` only; `beats_checkpoint` reads it with torch's restricted
unpickler. Nothing is fetched unless a config names a `hub_id`.
"""

from __future__ import annotations

from pathlib import Path

from crab.encoders.config import EncoderConfig

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WANTED = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)


def locate_weights(config: EncoderConfig) -> Path:
    """Path of the weights; downloads (safetensors and JSON only) when `hub_id` is given."""
    if config.hub_id:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(config.hub_id, revision=config.revision, allow_patterns=list(_WANTED))
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ValueError(
            f"encoder path {config.path!r} does not exist; give a folder with config.json and "
            "model.safetensors, or hub_id to download a repository by name"
        )
    return path


def require_safetensors(folder: Path) -> None:
    """Raise ValueError unless `folder` holds config.json and safetensors weights."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder; expected a folder with config.json and model.safetensors"
        )
    has_weights = any((folder / name).exists() for name in _WANTED[2:4])
    if not has_weights:
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds pickled weights only ({', '.join(pickles)}), and loading a pickle "
                "runs the code inside it; convert them to model.safetensors in a place you trust "
                "(for BEATs: crab.encoders.convert_beats_checkpoint)"
            )
        raise ValueError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; save the "
            "weights there as safetensors"
        )
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json; put the one of the checkpoint beside it")
