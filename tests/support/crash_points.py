"""Kills a rank of a run at one boundary after the other of what rank 0 does to the files of checkpoints.

Python tells an audit hook of every file that is opened, linked, removed and every folder that is made, before it is
done. The k-th crash of a run is at the boundary k modulo `BOUNDARIES` after the start of its process: of rank 0 itself,
or of rank 1 at that moment when k is odd.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path

BOUNDARIES = 24
"""More than one save has, the removal of old ones included: some crashes are in the second after a start."""
_EVENTS = ("open", "os.mkdir", "os.link", "os.remove", "os.rmdir")


def plant(out: Path, crashes: int) -> None:
    """To be called in every rank, when its recipe is made. `out`: the folder of the plan."""
    log = out / "crashes"
    log.mkdir(exist_ok=True)
    rank = int(os.environ["RANK"])
    (out / f"pid-of-{rank}").write_text(str(os.getpid()))
    if rank != 0:
        return
    (out / "newest").write_text(str(newest_whole(out / "run")))
    number = len(list(log.iterdir()))
    if number >= crashes:
        return
    boundary = itertools.count()
    wanted = number % BOUNDARIES
    armed = True

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal armed
        if not armed or event not in _EVENTS:
            return
        path = str(args[0])
        if "/run/checkpoint_" not in path and "/run/.incoming" not in path:
            return
        if event == "open" and path.endswith((".json", ".safetensors")):
            return  # reading
        if next(boundary) == wanted:
            armed = False
            victim = int((out / "pid-of-1").read_text()) if number % 2 else os.getpid()
            (log / f"{number:03d}").write_text(f"{event} {path}, killed {victim}")
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:  # rank 1 of this start has not told its pid yet
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def resumed(out: Path, step: int) -> None:
    """At the first step of a process: notes what it went on from beside the newest whole checkpoint there was."""
    newest = out / "newest"
    if os.environ.get("RANK") == "0" and newest.exists():
        with (out / "resumed").open("a") as file:
            file.write(json.dumps({"newest": int(newest.read_text()), "step": step}) + "\n")
        newest.unlink()


def newest_whole(run: Path) -> int:
    """Its step, or 0, by the promise of complete.json alone: it is there, and so are all its files in their sizes."""
    found = [0]
    for marker in run.glob("checkpoint_*/complete.json"):
        says = json.loads(marker.read_text())
        sizes = {name: size for name, (size, _) in says["files"].items()}
        there = {file.name: file.stat().st_size for file in marker.parent.iterdir()}
        if sizes.items() <= there.items():
            found.append(says["step"])
    return max(found)
