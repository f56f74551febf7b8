"""Code that travels with a job: named by its content, complete, and refused where it is not what its name says."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from crab_platform.storage import FolderStore
from jobs.code_zip import PACKAGES, CodeZip, pack, unpack, upload
from jobs.spec import SpecError


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for number, folder in enumerate(PACKAGES):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text(f"NUMBER = {number}\n")
    (root / "README.md").write_text("not code")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def test_the_same_files_are_the_same_zip_and_it_is_importable(
    checkout: Path, tmp_path: Path
) -> None:
    code = pack(dirty=False, root=checkout)
    (checkout / "crab" / "__init__.py").touch()  # another time is no other code
    assert pack(dirty=False, root=checkout) == code
    store = FolderStore(tmp_path / "bucket")
    upload(code, store)
    upload(code, store)
    assert store.list() == [code.path]
    folder = unpack(store, code.path, tmp_path / "code")
    names = sorted(PACKAGES.values())
    assert sorted(path.name for path in folder.iterdir()) == names
    said = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(names)}; print(crab_platform.NUMBER)"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said == "1\n"


def test_our_own_code_is_complete(tmp_path: Path) -> None:
    code = pack(dirty=True)
    with zipfile.ZipFile(io.BytesIO(code.data)) as archive:
        names = set(archive.namelist())
    assert {"jobs/cli.py", "crab_platform/rayjob.py", "jobs/specs/tune-heads.yaml"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_changes_that_are_not_committed_are_refused_unless_wanted(checkout: Path) -> None:
    clean = pack(dirty=False, root=checkout)
    (checkout / "README.md").write_text("changed, and no code")
    assert pack(dirty=False, root=checkout) == clean
    (checkout / "jobs" / "__init__.py").write_text("NUMBER = 9\n")
    with pytest.raises(SpecError, match=r"(?s)jobs/__init__.py.*--dirty"):
        pack(dirty=False, root=checkout)
    dirty = pack(dirty=True, root=checkout)
    assert dirty.path != clean.path
    assert dirty.commit == f"{clean.commit}+dirty"


def test_where_there_is_no_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="git checkout"):
        pack(dirty=False, root=tmp_path)


def test_a_zip_that_is_not_what_its_name_says_is_refused(checkout: Path, tmp_path: Path) -> None:
    code = pack(dirty=False, root=checkout)
    store = FolderStore(tmp_path / "bucket")
    store.create(code.path, code.data + b" ")
    with pytest.raises(ValueError, match="digest of its name"):
        unpack(store, code.path, tmp_path / "code")
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize("name", ["../out.py", "/out.py", "jobs/../../out.py"])
def test_a_file_outside_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "x = 1")
    code = CodeZip(data=buffer.getvalue(), commit="c")
    assert hashlib.sha256(code.data).hexdigest() in code.path
    store = FolderStore(tmp_path / "bucket")
    upload(code, store)
    with pytest.raises(ValueError, match="outside"):
        unpack(store, code.path, tmp_path / "code" / "deep")
    assert not list(tmp_path.rglob("out.py"))
