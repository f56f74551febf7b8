"""The code of this checkout as a zip in the bucket, for jobs whose image is older: `crab submit --code`.

Named by the SHA-256 of its bytes and made the same from the same files, so that a name means one code for ever and
uploading it twice uploads it once.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from crab_platform.storage import AlreadyExists, Store
from jobs.spec import SpecError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "crab": "crab",
    "platform/crab_platform": "crab_platform",
    "jobs": "jobs",
    "tune_spaces": "tune_spaces",
}
"""Folder in the checkout -> package in the zip."""
_DATE = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold


@dataclass(frozen=True, kw_only=True)
class CodeZip:
    data: bytes
    commit: str
    """Of git; with "+dirty" where files were changed since."""

    @property
    def path(self) -> str:
        """In the bucket."""
        return f"code/{hashlib.sha256(self.data).hexdigest()}.zip"


def pack(*, dirty: bool, root: Path = ROOT) -> CodeZip:
    """All tracked files of our packages.

    Args:
        dirty: take files with changes that are not committed as they are.

    Raises SpecError where the code is no git checkout, or has such changes and `dirty` is not given.
    """
    changed = _git(root, "status", "--porcelain", "--", *PACKAGES)
    if changed and not dirty:
        raise SpecError(
            "there are changes that are not committed, so nobody could say later what has run:\n"
            + "\n".join(changed[:10])
            + "\nCommit them, or submit them as they are with --dirty"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(_git(root, "ls-files", "--", *PACKAGES)):
            if not (root / name).is_file():  # removed, and that is not committed
                continue
            entry = zipfile.ZipInfo(_in_zip(name), _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())
    (commit,) = _git(root, "rev-parse", "HEAD")
    return CodeZip(data=buffer.getvalue(), commit=commit + ("+dirty" if changed else ""))


def upload(code: CodeZip, store: Store) -> None:
    """Raises StoreUnreachable."""
    try:
        store.create(code.path, code.data)
    except AlreadyExists:
        return


def unpack(store: Store, path: str, to: Path) -> Path:
    """Downloads a zip and lays its files into a folder named by its digest.

    Raises ValueError where the bytes are not those that its name says, or a file would lie outside.
    """
    digest = PurePosixPath(path).stem
    data = store.read(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{store.url}/{path} does not have the digest of its name; submit again with --code"
        )
    folder = to / digest
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"{path} has a file that would lie outside: {entry.filename}")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))
    return folder


def _in_zip(name: str) -> str:
    folder = next(folder for folder in PACKAGES if name.startswith(f"{folder}/"))
    return PACKAGES[folder] + name.removeprefix(folder)


def _git(root: Path, *arguments: str) -> list[str]:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SpecError("--code needs git, which is not installed") from error
    if done.returncode:
        raise SpecError(
            f"--code takes the code of a git checkout, and {root} is none: {done.stderr.strip()}"
        )
    return [line for line in done.stdout.splitlines() if line]
