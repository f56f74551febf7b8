"""Two ranks of torch.distributed on this machine, without Ray: processes that run a test file as a script."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = 2


def run_ranks(script: str, *arguments: Path | str) -> None:
    """Runs `script` as each rank and waits. Fails with what they said where one does not end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(RANKS),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        told = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(told)
