"""A checkpoint of ours beside DeepSpeed's: bytes, how long training stands still, and when it is written.

    python benchmarks/train_checkpoint.py [--repeats 3]

B14 of the performance notes: two processes with one thread each, ZeRO-3 as configured, an 8-layer Llama of width 1024
with Crab's adapter. Both write to the same disk; ours flushes it to the disk, DeepSpeed does not. Before any figure is
printed:

- a run that goes on from our checkpoint in new processes ends with the same bits as the one that wrote it;
- the adapter that is exported is read by plain PEFT in a process without DeepSpeed: the same bits, and the same loss.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measure import Goals, header, versions
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from train_engine import RANKS, Rank, environment, torchrun
from train_recipe import VOCABULARY, Plan, adapted_llama

from crab_platform import checkpoint, engine_state
from crab_platform.checkpoint import Marker
from crab_platform.checkpoint_writer import CheckpointWriter
from crab_platform.storage import open_store

PLAN = Plan(name="checkpoint", steps=4, width=1024, tokens=64)
HALF = PLAN.steps // 2
OURS = "ours"
LOSS_TOLERANCE = 1e-5
TIMEOUT_S = 900


@dataclass
class Kept:
    """What one way of keeping a state has cost, a repeat each."""

    bytes: int = 0
    still_s: list[float] = field(default_factory=list)
    """Training stands still."""
    written_s: list[float] = field(default_factory=list)
    """From the same moment until all is written."""


def write(folder: Path, repeats: int) -> None:
    """One rank: trains half of the plan, keeps the state in every way, trains the other half and keeps its end."""
    rank = Rank(PLAN)
    for step in range(HALF):
        rank.step(step)
    kept: dict[str, Kept] = {}
    for number in range(repeats):
        with CheckpointWriter(open_store(folder / OURS / str(number)), keep=1) as writer:
            _time(kept, OURS, lambda w=writer: _submit(rank, w, HALF), writer.wait)
            writer.close(TIMEOUT_S)
        for name, trained_only in (("default", False), ("without frozen", True)):
            _time(kept, name, lambda n=name, t=trained_only: _save(rank, folder / n, t))
    for name, trained_only in (("default", False), ("without frozen", True)):
        if rank.rank == 0:
            _time(
                kept, f"zero_to_fp32 of {name}", lambda n=name, t=trained_only: _merge(folder, n, t)
            )
    torch.distributed.barrier()
    for step in range(HALF, PLAN.steps):
        rank.step(step)
    _keep_end(rank, folder, "end")
    state = engine_state.gather_weights(rank.engine, rank.rank)
    loss = _evaluated(rank)
    if rank.rank == 0:
        _export(state, folder / "adapter")
        for name, ways in kept.items():
            ways.bytes = _bytes(folder / name / "0" if name == OURS else folder / name)
        (folder / "write.json").write_text(
            json.dumps(
                {
                    "kept": {name: vars(ways) for name, ways in kept.items()},
                    "elements": sum(tensor.numel() for tensor in state.values()),
                    "loss": loss,
                }
            )
        )


def resume(folder: Path) -> None:
    """One rank: goes on from our checkpoint of the first half, in new processes."""
    store = open_store(folder / OURS / "0")
    (name,) = checkpoint.names(store)
    marker, state = checkpoint.read(store, name)
    rank = Rank(PLAN, state=state, adam_step=marker.adam_step)
    for step in range(marker.step, PLAN.steps):
        rank.step(step)
    _keep_end(rank, folder, "resumed")


def _submit(rank: Rank, writer: CheckpointWriter, step: int) -> None:
    state, adam_step = engine_state.gather(rank.engine, rank.rank)
    if rank.rank == 0:
        writer.submit(state, _marker(rank, step, adam_step))


def _marker(rank: Rank, step: int, adam_step: int) -> Marker:
    layout = checkpoint.layout(rank.recipe.model, {"workers x micro_batches": RANKS})
    return Marker(
        step=step, adam_step=adam_step, layout=layout, data=rank.recipe.data, guard={}, metrics={}
    )


def _keep_end(rank: Rank, folder: Path, name: str) -> None:
    state, adam_step = engine_state.gather(rank.engine, rank.rank)
    if rank.rank == 0:
        marker = _marker(rank, PLAN.steps, adam_step)
        checkpoint.write(open_store(folder / name), checkpoint.new_name(PLAN.steps), state, marker)


def _save(rank: Rank, folder: Path, trained_only: bool) -> None:
    """DeepSpeed's own, over the one before."""
    rank.engine.save_checkpoint(str(folder), tag="kept", exclude_frozen_parameters=trained_only)


def _merge(folder: Path, name: str, trained_only: bool) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(
        str(folder / name),
        str(folder / f"zero_to_fp32 of {name}"),
        tag="kept",
        exclude_frozen_parameters=trained_only,
    )


def _time(
    kept: dict[str, Kept],
    name: str,
    still: Callable[[], object],
    wait: Callable[[], object] | None = None,
) -> None:
    if not name.startswith("zero_to_fp32"):
        torch.distributed.barrier()
    ways = kept.setdefault(name, Kept())
    started = time.perf_counter()
    still()
    ways.still_s.append(time.perf_counter() - started)
    if wait is not None:
        wait()
    ways.written_s.append(time.perf_counter() - started)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _evaluated(rank: Rank) -> float:
    """The loss of a batch without dropout. All ranks take part."""
    rank.engine.eval()
    with torch.no_grad():
        ids = _batch()
        return float(rank.engine(input_ids=ids, labels=ids, use_cache=False).loss)


def _batch() -> torch.Tensor:
    return torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(99))


def _export(state: dict[str, torch.Tensor], folder: Path) -> None:
    """As PEFT writes it: a model of its own whose adapter is the state."""
    model = adapted_llama(PLAN.width, PLAN.layers)
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder)


def export_is_wrong(folder: Path, loss: float) -> str:
    """What is wrong with the exported adapter, read by plain PEFT here; empty when nothing is."""
    store = open_store(folder / "end")
    (name,) = checkpoint.names(store)
    _, state = checkpoint.read(store, name)
    base = adapted_llama(PLAN.width, PLAN.layers).unload()
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    found = get_peft_model_state_dict(model)
    wanted = {
        key.removeprefix("weight/").replace(".default", ""): tensor
        for key, tensor in state.items()
        if key.startswith("weight/")
    }
    if found.keys() != wanted.keys():
        return f"its names differ: {sorted(found.keys() ^ wanted.keys())[:4]}"
    wrong = [key for key, tensor in wanted.items() if not torch.equal(found[key], tensor)]
    if wrong:
        return f"{len(wrong)} tensors have other bits, first {wrong[:2]}"
    ids = _batch()
    with torch.no_grad():
        read = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    return "" if abs(read - loss) <= LOSS_TOLERANCE else f"its loss is {read}, trained {loss}"


def files(folder: Path, name: str) -> dict[str, tuple[int, str]]:
    """Size and digest of every file of the one checkpoint below a folder."""
    store = open_store(folder / name)
    (found,) = checkpoint.names(store)
    return checkpoint.read_marker(store, found).files


def run_part(part: str, folder: Path, repeats: int) -> None:
    """Both ranks of a part, to their end. Raises RuntimeError with the end of what they said."""
    command = torchrun(__file__, "--part", part, "--folder", str(folder), "--repeats", str(repeats))
    log = folder / f"{part}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment(), stdout=out, stderr=out)
        try:
            failed = process.wait(TIMEOUT_S)
        finally:
            process.terminate()  # which ends its ranks; nothing when it has ended
            process.wait()
    if failed:
        raise RuntimeError(f"{part} failed:\n{log.read_text(errors='replace')[-4000:]}")


def bench(folder: Path, repeats: int, goals: Goals) -> None:
    """Runs both parts, checks, then prints."""
    for part in ("write", "resume"):
        run_part(part, folder, repeats)
    told = json.loads((folder / "write.json").read_text())
    end, resumed = files(folder, "end"), files(folder, "resumed")
    if end != resumed or end == files(folder, f"{OURS}/0"):
        goals.broken(f"the resumed run ended with {resumed}, the other with {end}: no figures")
        return
    print(
        f"resumed in new processes: weights and moments after step {PLAN.steps} equal in every bit"
    )
    if wrong := export_is_wrong(folder, told["loss"]):
        goals.broken(f"the exported adapter, read by plain PEFT: {wrong}; no figures")
        return
    print(f"exported adapter in plain PEFT: equal bits, loss {told['loss']:.4f} as trained")

    needed = told["elements"] * 3 * 4
    print(f"adapter and two moments in float32: {needed / 1e6:.1f} MB")
    print(f"{'':32} {'MB':>9} {'of needed':>9} {'still s':>9} {'written s':>9}")
    for name, ways in told["kept"].items():
        print(
            f"{name:32} {ways['bytes'] / 1e6:9.1f} {ways['bytes'] / needed:9.3f} "
            f"{statistics.median(ways['still_s']):9.3f} {statistics.median(ways['written_s']):9.3f}"
        )
    ours = told["kept"][OURS]
    goals.check("our bytes / adapter and optimizer", ours["bytes"] / needed, 1.05, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", choices=["write", "resume"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "write":
        write(args.folder, args.repeats)
        return 0
    if args.part == "resume":
        resume(args.folder)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the ranks end, too
    goals = Goals()
    header("checkpoints: 8-layer Llama, width 1024, Crab's adapter, ZeRO-3, two processes")
    print(f"{versions('torch', 'deepspeed', 'peft', 'safetensors')}; {args.repeats} repeats")
    with tempfile.TemporaryDirectory() as folder:
        bench(Path(folder), args.repeats, goals)
    return int(goals.failed)


if __name__ == "__main__":
    sys.exit(main())
