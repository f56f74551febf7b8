"""How a rank starts: without a compiler, and so without the lock that a killed one leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS = "from crab_platform.training_worker import init_distributed; init_distributed(use_gpu=False)"
DEEPSPEEDS = "import deepspeed; deepspeed.init_distributed(dist_backend='gloo', verbose=False)"
REDUCE = "import torch; x = torch.ones(3); torch.distributed.all_reduce(x); print(x.sum().item())"


@pytest.mark.parametrize(("start", "compiles"), [(OURS, False), (DEEPSPEEDS, True)])
def test_nothing_is_compiled(tmp_path: Path, start: str, compiles: bool) -> None:
    """DeepSpeed's own way shows that the check sees a compilation; it has a compiler that only fails."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\ncase $* in *version*) echo g++ 12.2.0;; *) exit 1;; esac\n")
    compiler.chmod(0o755)
    built = tmp_path / "built"
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(built),
        "CXX": str(compiler),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", f"{start}; {REDUCE}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert built.exists() == compiles, done.stderr
    if not compiles:
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "3.0"
