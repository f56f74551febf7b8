"""A program that writes to a folder on a bad disk, for tests that break the disk from outside.

Arguments: folder, kind of store, "entries" or "files", first number, how many. It says for each number what came of
it, by writev, since write is what fails. Any other error than the store's own ends it.

With "files" it loads nothing that starts threads: libfiu now and then locks up when threads start.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from crab_platform.storage import INCOMING, FolderStore, StoreError

SOUND = "sound"
IGNORES_ERRORS = "ignores-errors"
IGNORES_SHORT_WRITES = "ignores-short-writes"


class Careless(FolderStore):
    """Planted bug: what the disk says about a write is not looked at."""

    def __init__(self, folder: str, *, ignores_errors: bool) -> None:
        super().__init__(folder)
        self.ignores_errors = ignores_errors

    def create(self, path: str, data: bytes) -> None:
        target = Path(self.url, path)
        aside = Path(self.url, INCOMING, target.name)
        for file in (target, aside):
            file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(aside, os.O_CREAT | os.O_WRONLY)
        try:
            os.write(handle, data)
        except OSError as error:
            if not self.ignores_errors:
                raise StoreError(str(error)) from error
        finally:
            os.close(handle)
        os.link(aside, target)
        aside.unlink()


def content(number: int) -> bytes:
    """The bytes of the file of that number."""
    return random.Random(number).randbytes(100_000)


def file_path(number: int) -> str:
    return f"files/{number}"


def writer_of(store: FolderStore, what: str) -> Callable[[int], object]:
    if what == "files":
        return lambda number: store.create(file_path(number), content(number))

    from cache_samples import entry

    from crab_platform.cache import FeatureCache

    cache = FeatureCache(store)
    return lambda number: cache.commit([entry(number)])


def main() -> None:
    folder, kind, what, first, count = sys.argv[1:]
    sound = kind == SOUND
    store = (
        FolderStore(folder) if sound else Careless(folder, ignores_errors=kind == IGNORES_ERRORS)
    )
    write = writer_of(store, what)
    for number in range(int(first), int(first) + int(count)):
        try:
            write(number)
            said = "ok"
        except StoreError as error:
            said = type(error).__name__
        os.writev(1, [f"{number} {said}\n".encode()])


if __name__ == "__main__":
    main()
