"""Finding official files below a folder."""

import os
from pathlib import Path

import pytest

from crab.datasets.folder import Folder


def touch(root: Path, *names: str) -> Folder:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return Folder(root)


def test_annotations_by_official_name_or_with_something_before_it(tmp_path: Path) -> None:
    folder = touch(
        tmp_path,
        "deep/in/metadata.csv",
        "a_metadata.csv",
        "b-metadata.csv",
        "xmetadata.csv",
        "metadata.csv.bak",
    )
    found = [folder.relative(path) for path in folder.annotations("metadata.csv")]
    assert found == ["deep/in/metadata.csv", "a_metadata.csv", "b-metadata.csv"]


def test_a_preferred_folder_comes_first(tmp_path: Path) -> None:
    folder = touch(tmp_path, "json/x.json", "json_update/x.json")
    assert folder.relative(folder.annotation("x.json", ("json_update",))) == "json_update/x.json"
    assert folder.annotation("y.json") is None


def test_videos_anywhere_in_any_container_else_the_official_place(tmp_path: Path) -> None:
    folder = touch(tmp_path, "else/where/abc.mkv", "AVE/def.mp4")
    official = tmp_path / "AVE"
    assert folder.video("abc", official) == str(tmp_path / "else/where/abc.mkv")
    assert folder.video("def", official) == str(official / "def.mp4")
    assert folder.video("ghi", official) == str(official / "ghi.mp4")
    assert folder.has(str(official / "def.mp4"))
    assert not folder.has(str(official / "ghi.mp4"))


def test_folders_by_the_end_of_their_path(tmp_path: Path) -> None:
    folder = touch(tmp_path, "AVS/v2/u1/audio.wav", "AVS/v1s/u1/audio.wav")
    assert folder.folder("v2/u1", tmp_path / "v2/u1") == str(tmp_path / "AVS/v2/u1")
    assert folder.folder("v1m/u1", tmp_path / "v1m/u1") == str(tmp_path / "v1m/u1")


def test_the_second_tree_of_archives_from_a_mac_is_passed_over(tmp_path: Path) -> None:
    folder = touch(tmp_path, "__MACOSX/media/v/._audio.wav", "media/v/audio.wav")
    place = folder.folder("media/v", tmp_path / "data/media/v")
    assert place == str(tmp_path / "media/v")


def test_a_link_to_a_parent_ends(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path, tmp_path / "data" / "loop")
    folder = touch(tmp_path, "data/Annotations.txt")
    assert len(folder.annotations("Annotations.txt")) == 1


def test_a_folder_that_is_linked_is_searched(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "abc.mp4").touch()
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "set" / "AVE")
    folder = Folder(tmp_path / "set")
    assert folder.has(str(tmp_path / "set/AVE/abc.mp4"))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a folder"):
        Folder(tmp_path / "nowhere")
