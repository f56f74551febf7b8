"""Appends records to a spool until it is killed, a few bytes at a time, so that a kill tears lines.

    python -m support.torn_writer FOLDER URI ID

Prints a line `step N` after each record.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from support.spooled import first_record, metrics_record

from crab_platform import spool
from crab_platform.spool import Spool

_AT_ONCE = 7


def main() -> None:
    folder, uri, local_id = sys.argv[1:]
    out = Spool.create(Path(folder), first_record(uri, local_id))
    write = os.write

    def write_slowly(file: int, data: bytes) -> int:
        for start in range(0, len(data), _AT_ONCE):
            write(file, data[start : start + _AT_ONCE])
            time.sleep(0.0002)
        return len(data)

    spool.os.write = write_slowly  # type: ignore[attr-defined]
    step = 0
    while True:
        out.append(metrics_record(step))
        write(1, b"step %d\n" % step)
        step += 1


if __name__ == "__main__":
    main()
