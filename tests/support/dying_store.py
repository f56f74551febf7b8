"""A store whose process dies at a given write: what was written before is there, nothing after it ever comes."""

from __future__ import annotations

import threading
from pathlib import Path

from crab_platform.storage import Data, FolderStore


class Died(BaseException):
    """The process is dead."""


class DyingStore(FolderStore):
    """A folder for a process that lives for so many creates and deletes."""

    def __init__(self, folder: str | Path, writes: int) -> None:
        super().__init__(folder)
        self._left = writes
        self._lock = threading.Lock()

    def create(self, path: str, data: Data) -> None:
        self._step()
        super().create(path, data)

    def delete(self, path: str) -> None:
        self._step()
        super().delete(path)

    def _step(self) -> None:
        with self._lock:
            if self._left <= 0:
                raise Died
            self._left -= 1
