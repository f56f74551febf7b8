"""Which files of a folder were opened, seen from outside (inotify): what a job really read again."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Self

_IN_OPEN = 0x20
_IN_CLOSE_NOWRITE = 0x10
_IN_Q_OVERFLOW = 0x4000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


class Opens:
    """Counts opens of the files in one folder, by any process, from now on. A context manager."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        # Also closing, which is not counted: the kernel reports two like events in a row as one.
        mask = _IN_OPEN | _IN_CLOSE_NOWRITE
        if self._fd < 0 or libc.inotify_add_watch(self._fd, os.fsencode(folder), mask) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")
        self._count: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def count(self) -> Counter[str]:
        """File name -> opens so far."""
        while True:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return Counter(self._count)
            at = 0
            while at < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                if mask & _IN_Q_OVERFLOW:
                    raise OSError("events were lost: ask for the count more often")
                name = data[at : at + length].rstrip(b"\0").decode()
                if name and mask & _IN_OPEN:
                    self._count[name] += 1
                at += length

    def total(self) -> int:
        return self.count().total()

    def read_again(self) -> set[str]:
        """Files that were opened more often than most."""
        count = self.count()
        usual = Counter(count.values()).most_common(1)[0][0]
        return {name for name, opens in count.items() if opens > usual}
