"""Who wrote a file of a shared cache: Ed25519 signatures that stand in the file's name, and whom a reader trusts.

    commits/<id>.parquet                        unsigned
    commits/<id>.<zone>.<signature>.parquet     signed by the zone

In the name, because a listing then brings all signatures at once: no second object, no second
request, and the file itself stays plain parquet. A signature covers the folder, the id, the zone
and the SHA-256 of the bytes, so it is worth nothing under another name or over other rows. Rows
hold the BLAKE3 of each entry, so a signed commit vouches for its features as well.

A reader without trusted zones takes every file, as one team alone may. With zones it takes only
files signed by these; all others are counted by reason and looked at by people.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from crab_platform.identity import canonical_json, sha256_hex

UNSIGNED = "unsigned"
ZONE_NOT_TRUSTED = "zone_not_trusted"
SIGNATURE_WRONG = "signature_wrong"
DISTRUST = (UNSIGNED, ZONE_NOT_TRUSTED, SIGNATURE_WRONG)
"""Reasons why a reader with trusted zones does not take a file. Each is worth an alarm."""

_CONTEXT = "crab feature cache, signed file, 1"
_ZONE = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_NAME = re.compile(
    r"([a-z]+)/([0-9a-f]{16}-[0-9a-f]{16})(?:\.([a-z0-9][a-z0-9-]{0,31})\.([0-9a-f]{128}))?\.parquet"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileName:
    """The parts of a path such as commits/<id>.<zone>.<signature>.parquet."""

    path: str
    folder: str
    identifier: str
    zone: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Signer:
    """Signs what one zone writes. Holds where the private key lies, never the key: it is read anew in every process."""

    zone: str
    key_file: str
    """A file of 64 hex digits that only its owner may read, as `crab cache keygen` makes it."""

    def __post_init__(self) -> None:
        check_zone(self.zone)

    @cached_property
    def _key(self) -> Ed25519PrivateKey:
        path = Path(self.key_file)
        try:
            if path.stat().st_mode & 0o077:
                raise ValueError(f"{path} may be read by others than its owner: chmod 600 {path}")
            return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text().strip()))
        except OSError as error:
            raise ValueError(f"the signing key of zone {self.zone!r}: {error}") from error
        except ValueError as error:
            if str(path) in str(error):
                raise
            # The library's own words might quote the key.
            raise ValueError(f"{path} holds no Ed25519 key of 64 hex digits") from None

    def __reduce__(self) -> tuple[type[Signer], tuple[str, str]]:
        return (Signer, (self.zone, self.key_file))

    def sign(self, folder: str, identifier: str, data: bytes) -> str:
        """The signature of a file to be, 128 hex digits."""
        return self._key.sign(_statement(folder, identifier, self.zone, data)).hex()

    @property
    def public_key(self) -> str:
        """What readers need to trust this zone: 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()


@dataclass(frozen=True)
class Trust:
    """Zones whose files are taken: name -> public key, 64 hex digits. None at all: every file is taken."""

    zones: Mapping[str, str]

    def __post_init__(self) -> None:
        for zone, key in self.zones.items():
            check_zone(zone)
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise ValueError(
                    f"the public key of zone {zone!r} is {key!r}; expected 64 hex digits"
                )

    @cached_property
    def _keys(self) -> dict[str, Ed25519PublicKey]:
        return {
            zone: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
            for zone, key in self.zones.items()
        }

    def __reduce__(self) -> tuple[type[Trust], tuple[dict[str, str]]]:
        return (Trust, (dict(self.zones),))

    def distrusts_name(self, name: FileName) -> str:
        """Why a file is not taken whatever it holds: UNSIGNED, ZONE_NOT_TRUSTED or "" (read it and ask `distrusts`)."""
        if not self.zones:
            return ""
        if not name.zone:
            return UNSIGNED
        return "" if name.zone in self.zones else ZONE_NOT_TRUSTED

    def distrusts(self, name: FileName, data: bytes) -> str:
        """Why a file is not taken, one of DISTRUST; "" when it is."""
        reason = self.distrusts_name(name)
        if reason or not self.zones:
            return reason
        statement = _statement(name.folder, name.identifier, name.zone, data)
        try:
            self._keys[name.zone].verify(bytes.fromhex(name.signature), statement)
        except InvalidSignature:
            return SIGNATURE_WRONG
        return ""


EVERYONE = Trust({})


def file_path(folder: str, identifier: str, data: bytes, signer: Signer | None) -> str:
    """The path of a new file, signed when there is a signer."""
    if signer is None:
        return f"{folder}/{identifier}.parquet"
    return f"{folder}/{identifier}.{signer.zone}.{signer.sign(folder, identifier, data)}.parquet"


def parse_path(path: str) -> FileName | None:
    """The parts of a path that `file_path` made; None for any other."""
    found = _NAME.fullmatch(path)
    if found is None:
        return None
    folder, identifier, zone, signature = found.groups()
    return FileName(
        path=path,
        folder=folder,
        identifier=identifier,
        zone=zone or "",
        signature=signature or "",
    )


def make_key(path: str | Path) -> str:
    """Writes a new private key, readable by its owner only, and returns the public one.

    Raises FileExistsError: a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(key.private_bytes_raw().hex() + "\n")
    return key.public_key().public_bytes_raw().hex()


def check_zone(zone: str) -> str:
    """`zone` itself, or ValueError when it is no name of a zone."""
    if not _ZONE.fullmatch(zone):
        raise ValueError(f"{zone!r} is no name of a zone; use lower-case letters, digits and -")
    return zone


def _statement(folder: str, identifier: str, zone: str, data: bytes) -> bytes:
    return canonical_json([_CONTEXT, folder, identifier, zone, sha256_hex(data)])
