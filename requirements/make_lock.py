"""Writes requirements/{lock,dev,cuda}.txt from pyproject.toml (`make lock`).

uv resolves once for Python 3.11 and 3.12 on every system, with hashes. What only tests and checks need goes to dev.txt,
which the cluster's image leaves out. Two things are then changed, because torch comes in two builds:
- what only torch's CUDA build needs goes to cuda.txt, so that a machine without a GPU does not download it;
- the digest of a CPU wheel at hand (PIP_FIND_LINKS) is added beside those of PyPI: same version, other file.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CUDA_ONLY = re.compile(r"(nvidia-(?!ml-py)|cuda-|triton==)")
HEAD = "# Made by `make lock` from pyproject.toml. Do not edit.\n"


def resolve(pyproject: Path, *options: str) -> str:
    command = [sys.executable, "-m", "uv", "pip", "compile", str(pyproject), *options]
    command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate"]
    command += ["--no-header", "--quiet", "--default-index", "https://pypi.org/simple"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def blocks(text: str) -> list[str]:
    """One string a requirement: its line and the hash lines that follow it."""
    return [block for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if block.strip()]


def known_cpu_hashes(lock: Path) -> list[str]:
    """Digests of CPU wheels noted in the lock file before this run, so that a machine without them keeps them."""
    if not lock.exists():
        return []
    return re.findall(
        r"^# cpu wheel of torch: (sha256:[0-9a-f]{64})$", lock.read_text(), re.MULTILINE
    )


def local_cpu_hashes(version: str) -> list[str]:
    folders = [Path(entry) for entry in os.environ.get("PIP_FIND_LINKS", "").split() if entry]
    wheels = [wheel for folder in folders for wheel in folder.glob(f"torch-{version}+cpu-*.whl")]
    return [f"sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in sorted(wheels)]


def name(block: str) -> str:
    return block.split("==")[0]


def main() -> None:
    lock, dev, cuda = HERE / "lock.txt", HERE / "dev.txt", HERE / "cuda.txt"
    common, dev_only, cuda_only, cpu_hashes = [], [], [], known_cpu_hashes(lock)
    project = HERE.parent / "pyproject.toml"
    run = ("--extra", "server", "--extra", "build")
    everything = resolve(project, *run, "--extra", "dev")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write("".join(line.split(" \\")[0] + "\n" for line in blocks(everything)))
        pins.flush()
        runs = resolve(project, *run, "--constraint", pins.name)
    needed = {name(block) for block in blocks(runs)}
    for block in blocks(everything):
        if name(block) not in needed:
            dev_only.append(block)
            continue
        if CUDA_ONLY.match(block):
            cuda_only.append(block)
            continue
        version = re.match(r"torch==([0-9.]+)", block)
        if version:
            cpu_hashes = sorted(set(cpu_hashes) | set(local_cpu_hashes(version[1])))
            notes = "".join(f"# cpu wheel of torch: {digest}\n" for digest in cpu_hashes)
            extra = "".join(f" \\\n    --hash={digest}" for digest in cpu_hashes)
            block = notes + block.rstrip("\n") + extra + "\n"
        common.append(block)
    lock.write_text(HEAD + "".join(common))
    cuda.write_text(
        HEAD + "# What torch's CUDA build needs beside lock.txt.\n" + "".join(cuda_only)
    )
    dev.write_text(HEAD + "# What only tests and checks need.\n" + "".join(dev_only))
    for file, found in ((lock, common), (dev, dev_only), (cuda, cuda_only)):
        print(f"{file}: {len(found)} packages")


if __name__ == "__main__":
    main()
