"""`crab doctor`: every part is used once for real, and says what to do where it does not work."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from jobs.output import console


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    ok: bool
    found: str


def check_all(cache: str | None = None) -> list[Check]:
    """Runs every check; one that fails does not stop the others."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("torch", _torch),
        ("memory and disk", _room),
        ("synth and decode", _decode),
        ("tiny preset", _encoders),
        ("compiler for DeepSpeed", _compiler),
        ("DeepSpeed", _deepspeed),
        ("MLflow", _mlflow),
        ("Ray", _ray),
    ]
    if cache is not None:
        checks.append((f"cache {cache}", lambda: usable_store(cache)))
    return [check(name, run) for name, run in checks]


def check(name: str, run: Callable[[], str]) -> Check:
    """One line of the table. `run` says what it found, or raises."""
    try:
        return Check(name=name, ok=True, found=run())
    except Exception as error:  # whatever is wrong is the finding
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name=name, ok=False, found=text[:300])


def show(results: list[Check]) -> None:
    """The checks as a table."""
    table = Table(title="crab doctor", title_justify="left")
    for heading in ("part", "", "found"):
        table.add_column(heading)
    for result in results:
        table.add_row(result.name, "ok" if result.ok else "FAILS", result.found)
    console.print(table)


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise RuntimeError(f"Python {sys.version.split()[0]}; 3.11 or 3.12 is needed")
    return sys.version.split()[0]


def _torch() -> str:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(devices) or 'CPU only'}"


def _room() -> str:
    import psutil

    free = shutil.disk_usage(".").free
    memory = psutil.virtual_memory().available
    if free < 2 << 30 or memory < 2 << 30:
        raise RuntimeError(
            f"{free >> 20} MB disk and {memory >> 20} MB memory free; 2 GB of each are needed"
        )
    return (
        f"{memory / 2**30:.1f} GB memory, {free / 2**30:.0f} GB disk free, {os.cpu_count()} cores"
    )


def _decode() -> str:
    from crab.media import DecodePool, DecodeRequest, Failure
    from crab.sampling import AudioSampling, VideoSampling
    from crab.synth.make import make_scene
    from crab.synth.write import write_clip

    with tempfile.TemporaryDirectory() as folder, DecodePool(num_workers=1) as pool:
        clip = Path(folder) / "clip.mp4"
        write_clip(make_scene(0, 0), clip, 112)
        request = DecodeRequest(
            source=str(clip), video=VideoSampling(size=112), audio=AudioSampling()
        )
        (result,) = pool.decode([request])
        for answer in (result.decoded.video, result.decoded.audio):
            if answer is None or isinstance(answer, Failure):
                raise RuntimeError(f"a clip of our own cannot be decoded: {answer}")
    return f"10 frames by {result.decoded.backend}, 10 s of sound"


def _encoders() -> str:
    import numpy as np

    from crab.encoders.load import load_encoder
    from jobs.presets import encoder_configs
    from jobs.spec import Encoders

    names = []
    for config in encoder_configs(Encoders()):
        encoder = load_encoder(config)
        batch = (
            np.zeros((1, 112, 112, 3), np.uint8)
            if encoder.stream == "video"
            else np.zeros((1, 16_000), np.float32)
        )
        encoder.encode(batch)
        names.append(f"{encoder.name} {encoder.weights_sha256[:8]}")
    return ", ".join(names)


def _compiler() -> str:
    path = shutil.which("g++") or shutil.which("c++")
    if path is None:
        raise RuntimeError("no g++: apt-get install g++ (DeepSpeed builds an operator on a CPU)")
    if shutil.which("ninja") is None:
        raise RuntimeError(f"no ninja on PATH; run crab from its environment: {sys.prefix}/bin")
    return path


def _deepspeed() -> str:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return str(deepspeed.__version__)


def _mlflow() -> str:
    import mlflow

    from crab_platform.tracking import start_run

    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        with start_run(uri, "doctor", "doctor", spec={"a": 1}) as run:
            run.metrics({"b": 1.0})
    return str(mlflow.__version__)


def _ray() -> str:
    import ray

    from crab_platform.ray_cluster import connected

    with connected():
        answer = ray.get(ray.remote(_answer).remote())
    return f"{ray.__version__}, a worker answers from Python {answer}"


def _answer() -> str:
    import platform

    import crab_platform  # noqa: F401 (that it is importable there is what is tested)

    return platform.python_version()


def usable_store(url: str) -> str:
    """What a store does when it is used; it must not overwrite. Raises StoreUnreachable, RuntimeError."""
    from crab_platform.storage import AlreadyExists, open_store

    store = open_store(url)
    path = f"doctor/{secrets.token_hex(8)}"
    store.create(path, b"crab")
    try:
        store.create(path, b"crub")
    except AlreadyExists:
        if store.read(path) == b"crab":
            return f"writes, reads, and refuses to overwrite ({path} stays there, 4 bytes)"
    raise RuntimeError(
        "this store overwrites files that exist; it must honour If-None-Match on PUT"
    )
