"""A data set's folder, walked once: where its annotation files and its media lie.

People unpack the official archives in their own ways, so files are found by their official names anywhere below the
folder. One walk answers every later question from memory: AVSBench alone has 300,000 files, and asking a network
folder about each takes hours. Files that are not there get the place that the official layout gives them, so that
samples written before the media came need not be written again.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
_ANNOTATIONS = (".txt", ".csv", ".json")
_NAMED = (*VIDEO_ENDINGS, ".mp3", ".wav", ".m4a", *_ANNOTATIONS)
"Kinds of file whose own name tells them apart; frames are `0.jpg` in every folder and are found by their folder."

_MAC_SHADOW = "__MACOSX"
"Zip archives made on a Mac hold a second tree of this name, with the same folders and no content."


class Folder:
    """FileNotFoundError for a folder that is not there. Links to folders are followed, once each."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; give the folder of the data set")
        self._files: dict[str, frozenset[str]] = {}
        self._named: defaultdict[str, list[str]] = defaultdict(list)
        self._folders: defaultdict[str, list[str]] = defaultdict(list)
        seen: set[tuple[int, int]] = set()
        for path, folders, files in os.walk(self.root, followlinks=True):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(
                name for name in folders if not name.startswith(".") and name != _MAC_SHADOW
            )
            self._files[path] = frozenset(files)
            self._folders[os.path.basename(path)].append(path)
            for name in files:
                if name.lower().endswith(_NAMED) and not name.startswith("."):
                    self._named[name].append(path)

    def has(self, path: str) -> bool:
        """Whether an absolute path below the folder was there when it was walked."""
        parent, name = os.path.split(path)
        return name in self._files.get(parent, ())

    def annotations(self, name: str) -> list[Path]:
        """Files called `name`, `<anything>_name` or `<anything>-name`: exact names first, then the least deep."""
        pattern = re.compile(rf"(?:.+[_-])?{re.escape(name)}")
        found = [
            Path(parent, other)
            for other, parents in self._named.items()
            if pattern.fullmatch(other)
            for parent in parents
        ]
        return sorted(found, key=lambda path: (path.name != name, len(path.parts), str(path)))

    def annotation(self, name: str, prefer: Sequence[str] = ()) -> Path | None:
        """The first of `annotations`, those in a folder of a name in `prefer` before others. None: there is none."""
        found = self.annotations(name)
        preferred = [path for parent in prefer for path in found if path.parent.name == parent]
        return next(iter(preferred + found), None)

    def named(self, ending: str) -> list[Path]:
        """All annotation files whose name ends so, sorted."""
        return sorted(
            Path(parent, name)
            for name, parents in self._named.items()
            if name.endswith(ending)
            for parent in parents
        )

    def relative(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def file(self, name: str, official: Path) -> str:
        """Where a file of that name lies; `official`, its place in the official layout, if it is there or nowhere."""
        if self.has(str(official)):
            return str(official)
        parents = self._named.get(name)
        return os.path.join(min(parents), name) if parents else str(official)

    def video(self, stem: str, official: Path) -> str:
        """The video `stem` in any container that downloads come in; else `official`/stem.mp4."""
        for ending in VIDEO_ENDINGS:
            path = self.file(stem + ending, official / (stem + ending))
            if self.has(path):
                return path
        return str(official / f"{stem}.mp4")

    def folder(self, tail: str, official: Path) -> str:
        """The folder whose path ends in `tail` ("v1s/xyz"); `official` where there is none."""
        if str(official) in self._files:
            return str(official)
        last = tail.rsplit("/", 1)[-1]
        fitting = [path for path in self._folders.get(last, ()) if path.endswith(f"/{tail}")]
        return min(fitting) if fitting else str(official)
