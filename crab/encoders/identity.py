"""What an encoder is, without loading it where it was loaded before.

The record of an encoder is taken from the weights as they were loaded, which needs torch and transformers: three
seconds for the smallest encoder, more for 1.2 GB of CLIP. A job that finds everything in the cache needs nothing else
of them. So the record is remembered in a folder of this user, under a digest of all that it was made from: the bytes
of the files, the choices of the config, the versions of the libraries and the source of this package. Other bytes are
another digest; whatever cannot be read there is made again. Whoever encodes compares the record with the encoder that
was really loaded (`expect_record`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from crab.encoders.config import EncoderConfig
from crab.encoders.declared import declared_files
from crab.encoders.weights import locate_weights

log = logging.getLogger(__name__)

CACHE_DIR_VARIABLE = "CRAB_CACHE_DIR"
"""Where small things are remembered; $XDG_CACHE_HOME/crab or ~/.cache/crab when it is not set."""

_LIBRARIES = "torch", "transformers", "safetensors"


@dataclass(frozen=True, kw_only=True)
class EncoderIdentity:
    """An encoder as cache keys and samplers need it."""

    stream: Literal["video", "audio"]
    record: dict[str, Any]
    """`Encoder.record()`: strings, ints and lists of them."""
    image_size: int | None
    """Pixels of a side; None for audio."""


def identify(config: EncoderConfig) -> EncoderIdentity:
    """The identity of the encoder that `config` describes; loads it only where it is not remembered.

    Raises ValueError as `load_encoder` does.
    """
    path = _remembered_at(config)
    try:
        found = json.loads(path.read_text())
        return EncoderIdentity(**found)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        log.info("%s cannot be used (%s); the encoder is loaded instead", path, error)
    # Here, as a remembered encoder must not cost these imports.
    from crab.encoders.frozen import VisionEncoder
    from crab.encoders.load import load_encoder

    encoder = load_encoder(config)
    identity = EncoderIdentity(
        stream=encoder.stream,
        record=encoder.record(),
        image_size=encoder.image_size if isinstance(encoder, VisionEncoder) else None,
    )
    # Only if the files are still those that the digest was taken of.
    if _remembered_at(config) == path:
        _remember(path, identity)
    return identity


def expect_record(
    config: EncoderConfig, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Raises ValueError where an encoder that was loaded is not the one that keys were made for."""
    if found != expected:
        fields = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise ValueError(
            f"{config.path or config.hub_id} holds another encoder than when the job started (other: "
            f"{', '.join(fields)}); its features would lie under the wrong keys. Start the job again"
        )


def _remembered_at(config: EncoderConfig) -> Path:
    """The file of the identity: named by a digest of everything that it depends on."""
    folder = locate_weights(config)
    files = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.is_file())
    contents = {str(path.name): _sha256(path) for path in declared_files(config)}
    depends = {
        "kind": config.kind,
        "select_layers": config.select_layers,
        "dtype": config.dtype,
        # A file that is not declared is not read, but may be why a folder is refused.
        "files": {path.name: contents.get(path.name) for path in files},
        "libraries": {name: version(name) for name in _LIBRARIES},
        "source": {path.name: _sha256(path) for path in sorted(Path(__file__).parent.glob("*.py"))},
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return _folder() / "encoders" / f"{digest}.json"


def _folder() -> Path:
    if given := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crab"


def _remember(path: Path, identity: EncoderIdentity) -> None:
    """Whole or not at all; a folder that cannot be written costs time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_text(json.dumps(asdict(identity), indent=2))
            os.replace(written, path)
    except OSError as error:
        log.info("%s cannot be written (%s); the encoder is loaded again next time", path, error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
