"""A recipe for crab_platform.training: a small random Crab, sixteen invented samples with and without masks, and faults
to order.

Top-level functions and frozen records only: Ray Train's workers import this file and build the recipe themselves.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from support import crash_points
from tiny_crab import config, example, mask_example, plain_llm, tokenizer

from crab import train as schedule
from crab.adapter import health, record_routing
from crab.model.artifact import save_model
from crab.model.build import build_model
from crab.model.collate import Collator
from crab.model.config import CrabConfig, LlmConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import load_tokenizer
from crab.model.recompute import recompute_activations
from crab_platform import engine_state, guards, notice
from crab_platform.checkpoint_writer import CheckpointWriter
from crab_platform.training import TrainingConfig, TrainingResult, train

NUM_SAMPLES = 16
TEXT = tuple(range(20, 60))
"""Token ids of the plain language model."""
GLOBAL_BATCH = 4
BEGAN = "began"
"""File with the first step (0-based) of every start of the workers, a line each."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run learns, and what goes wrong in it."""

    llm: str
    """Folder with a small LLM and its tokenizer (write_llm)."""
    out: str
    """Folder for what the run leaves: adapter/, pids, and the file that says that the fault has happened."""
    steps: int = 6
    parts: int = 2
    """Ranks x micro batches. Dropout depends on where the global batch is cut, so runs compare at equal parts."""
    dropout: float = 0.0
    peak: float = 5e-3
    """Highest learning rate."""
    seed: int = 12
    """With it one rank has masks in the first micro batch of all and the other has none, where ZeRO-3 is most easily
    led astray: weights that stay for good are not gathered yet."""
    stop_after: int | None = None
    """Ends after so many steps, as if it were done; the schedule is that of all."""
    kill_at: tuple[int, ...] = ()
    """A rank kills itself in each of these steps (0-based), once: the last in odd ones, rank 0 in even ones."""
    crashes: int = 0
    """So many times a rank is killed at the next boundary of what rank 0 does to checkpoint files (crash_points.py)."""
    step_s: float = 0.0
    """So long every step takes at least, asleep."""
    hold_at: int | None = None
    """The last rank stops for good in the middle of this step, once; somebody will kill it."""
    freeze_at: int | None = None
    """The last rank is stopped by SIGSTOP in the middle of this step, once; nobody wakes it."""
    nan_at: tuple[int, ...] = ()
    """In these steps (0-based) the last rank, and no other, meets NaN."""
    nan_in: Literal["gradient", "loss", "features"] = "gradient"
    infinite: bool = False
    """Infinity in the place of NaN."""
    waits_for_checkpoints: bool = False
    """Planted bug: a checkpoint is written before training goes on."""
    without_gate: bool = False
    """Planted bug: every update is applied, whatever the guard says."""
    recomputes: bool = False
    """Activation checkpointing."""
    watches_routers: bool = False
    """Sums of how the routers use their heads are added to those of the loss, in every step."""
    data_s: float = 0.0
    """So long the last rank waits for each of its batches."""
    keeps_text_logits: bool = False
    """After the last step every rank keeps what the engine says to TEXT in text-RANK.pt."""
    without_gathering: bool = False
    """Planted bug: what is exported is what each parameter holds on rank 0, sharded or not."""
    data: str = "the same"
    """Digest of the samples, as far as checkpoints go."""
    forgets: Literal["dropout", "data", "schedule", "part"] | None = None
    """Planted bug: draws from a generator of the process, or counts its own batches, instead of asking the step; or
    draws by rank, as DeepSpeed's users do, instead of by the part of the batch."""
    is_deaf: bool = False
    """Planted bug: workers never ask whether the end is near."""


def write_llm(folder: Path) -> str:
    plain_llm().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def crab_config(plan: Plan) -> CrabConfig:
    base = config()
    return base.model_copy(
        update={
            "llm": LlmConfig(path=plan.llm),
            "video": base.video.model_copy(update={"dropout": plan.dropout}),
            "audio": base.audio.model_copy(update={"dropout": plan.dropout}),
            "adapter": base.adapter.model_copy(update={"lora_dropout": plan.dropout}),
        }
    )


class TinyRecipe:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.num_steps = plan.stop_after or plan.steps
        self.data = plan.data
        settings = crab_config(plan)
        self.tokenizer = load_tokenizer(plan.llm)
        self.model: CrabModel = build_model(settings, self.tokenizer)
        if plan.recomputes:
            recompute_activations(self.model)
        self._collate = Collator(settings, self.tokenizer, self.model.table)
        self._own_count = itertools.count()
        self._began = False
        self._out = Path(plan.out)
        # Every process draws its own mask files: another one would read them half written.
        masks = self._out / f"masks-{os.getpid()}"
        masks.mkdir(parents=True, exist_ok=True)
        # Every fourth has masks; of the others every third has no video and every third no audio: ranks differ in what
        # they hold.
        self._examples = [
            mask_example(masks, i, task=("ms3", "avss")[i // 4 % 2])
            if i % 4 == 0
            else example(i, streams=("va", "v", "a")[i % 3])
            for i in range(NUM_SAMPLES)
        ]
        if plan.waits_for_checkpoints:
            submit = CheckpointWriter.submit

            def submit_and_wait(writer: CheckpointWriter, *args: Any) -> None:
                submit(writer, *args)
                writer.wait()

            CheckpointWriter.submit = submit_and_wait  # type: ignore[method-assign]  # planted
        if plan.without_gate:
            guards.Guard.objection = lambda _self, _values: None  # type: ignore[method-assign]
        if plan.is_deaf:
            notice.Notice.news = lambda _self: "none"  # type: ignore[method-assign]
        if plan.without_gathering:
            engine_state.gather_weights = lambda engine, _rank: {
                n: p.detach().cpu().clone() for n, p in engine_state.trained(engine.module).items()
            }
        if plan.crashes:
            crash_points.plant(self._out, plan.crashes)
        with (self._out / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def parameters(self) -> list[dict[str, Any]]:
        return schedule.parameter_groups(self.model.trainable_parameters())

    def learning_rate(self, step: int) -> float:
        if self.plan.forgets == "schedule":
            step = next(self._own_count)
        # 0 in the last step: what its forward shows is what is exported.
        return schedule.cosine_lr(step, num_steps=self.plan.steps - 1, peak=self.plan.peak)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        if self.plan.forgets == "data":
            step = next(self._own_count)
        indices = schedule.batch_indices(self.plan.seed, step, GLOBAL_BATCH, NUM_SAMPLES)
        samples = [self._examples[i].sample for i in indices]
        tokens = sum(self._collate.num_target_tokens(sample) for sample in samples)
        frames = sum(self._collate.num_mask_frames(sample) for sample in samples)
        mine = schedule.rank_slice(indices, rank, world_size)
        if not self._began and rank == 0:
            with (self._out / BEGAN).open("a") as file:
                file.write(f"{step}\n")
        self._began = True
        time.sleep(self.plan.step_s)
        crash_points.resumed(self._out, step)
        for part in schedule.micro_batches(mine, GLOBAL_BATCH // self.plan.parts):
            bad = step in self.plan.nan_at and rank == world_size - 1
            if rank == world_size - 1:
                time.sleep(self.plan.data_s)
            tensors = self._collate([self._examples[i] for i in part])
            if bad and self.plan.nan_in == "features":
                tensors |= {n: self._spoilt(tensors[n]) for n in ("video", "audio") if n in tensors}
            yield {
                "tensors": tensors,
                "normalizers": (float(tokens), float(frames)),
                "samples": float(sum(1 << i for i in part)),
                "bad": bad,
                "probed": step == self.plan.steps - 1 and rank == 0,
            }
            self._fault(step, rank, world_size)
        if self.plan.keeps_text_logits and step == self.plan.steps - 1:
            self._keep_text_logits(rank)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        watch = record_routing(self.model) if self.plan.watches_routers else nullcontext({})
        with recorded_logits(self.model) as logits, watch as gates:
            output = model(batch["tensors"], *batch["normalizers"])
        if batch["bad"] and self.plan.nan_in == "gradient":
            output["loss"].register_hook(self._spoilt)
        if batch["bad"] and self.plan.nan_in == "loss":
            output["loss"] = self._spoilt(output["loss"])
        if batch["probed"]:
            torch.save({"batch": batch["tensors"], "logits": logits[0]}, self._out / "probe.pt")
        return output["loss"], {
            "samples": torch.tensor(batch["samples"]),
            "tokens": output["sample_tokens"].sum(),
            "mask_frames": output["sample_mask_frames"].sum(),
            "mask_loss": output["sample_mask_loss"].sum(),
        } | (health.sums(gates, batch["tensors"]["attention_mask"]) if gates else {})

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        found = {name: sums[name] for name in ("samples", "tokens", "mask_frames", "mask_loss")}
        return found | (health.metrics(sums) if self.plan.watches_routers else {})

    def seed(self, step: int, micro: int, rank: int) -> int:
        if self.plan.forgets == "dropout":
            return next(self._own_count)
        parts_a_rank = self.plan.parts // torch.distributed.get_world_size()
        if self.plan.forgets == "part":
            return schedule.step_seed(self.plan.seed, 1000 * step + micro, rank)
        return schedule.step_seed(self.plan.seed, step, rank * parts_a_rank + micro)

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        folder = self._out / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        save_model(self.model, self.tokenizer, folder, state=state, lineage={"step": step})

    def _keep_text_logits(self, rank: int) -> None:
        """All ranks are here, the update of the last step is done: ZeRO-3 gathers each layer as in training."""
        self.model.llm.eval()
        with torch.no_grad():
            logits = self.model.llm(input_ids=torch.tensor([TEXT])).logits
        self.model.llm.train()
        torch.save(logits, self._out / f"text-{rank}.pt")

    def _spoilt(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (math.inf if self.plan.infinite else math.nan)

    def _fault(self, step: int, rank: int, world_size: int) -> None:
        """Between two micro batches, when gradients of the step are there and its update is not; after the last micro
        batch of a rank the update is done, and its checkpoint is not."""
        last = rank == world_size - 1
        if step in self.plan.kill_at and (last if step % 2 else rank == 0):
            if self._once(f"killed-{step}"):
                os.kill(os.getpid(), signal.SIGKILL)
        if self.plan.hold_at == step and last and self._once("held"):
            time.sleep(3600)
        if self.plan.freeze_at == step and last and self._once("frozen"):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _once(self, name: str) -> bool:
        try:
            (self._out / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


@contextmanager
def recorded_logits(model: CrabModel) -> Iterator[list[torch.Tensor]]:
    """The logits of every forward in the block, detached, in float32."""
    seen: list[torch.Tensor] = []
    hook = model.new_head.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.detach().float())
    )
    try:
        yield seen
    finally:
        hook.remove()


def plain_losses(plan: Plan) -> list[float]:
    """The same training by PyTorch alone: one process, no DeepSpeed, no Ray."""
    recipe = TinyRecipe(plan)
    optimizer = torch.optim.AdamW(recipe.parameters(), weight_decay=0.0)
    parameters = list(recipe.model.trainable_parameters().values())
    losses = []
    for step in range(plan.steps):
        total = 0.0
        for batch in recipe.micro_batches(step, 0, 1):
            loss, _ = recipe.loss(recipe.model, batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run showed: the metrics of every step in the order of their arrival."""

    plan: Plan
    config: TrainingConfig
    metrics: list[dict[str, float]]
    result: TrainingResult

    @property
    def losses(self) -> list[float]:
        return [metrics["loss"] for metrics in self.metrics]

    @property
    def steps(self) -> list[int]:
        return [int(metrics["step"]) for metrics in self.metrics]

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return Path(self.config.run)

    @property
    def began(self) -> list[int]:
        """The first step (0-based) of every start of the workers."""
        return [int(line) for line in Path(self.plan.out, BEGAN).read_text().split()]

    def checkpoint(self, step: int) -> Path:
        (folder,) = self.folder.glob(f"checkpoint_{step:08d}_*")
        return folder

    def exported(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        adapter = Path(self.plan.out) / "adapter"
        files = ("trained.safetensors", "adapter/adapter_model.safetensors")
        return {f"{file}:{k}": v for file in files for k, v in load_file(adapter / file).items()}


def run(
    plan: Plan,
    *,
    on_step: Callable[[int], object] | None = None,
    stop: Event | None = None,
    **changes: Any,
) -> Run:
    """Trains `plan`; to be called inside a connection to Ray. The checkpoints lie beside its output.

    `on_step` hears of every step (1-based) when its metrics arrive; who sets `stop` ends the run as SIGTERM does.
    """
    settings = TrainingConfig(
        name="run", storage_path=plan.out, checkpoint_every=2, keep_checkpoints=10, max_failures=1
    )
    settings = replace(settings, **changes)
    metrics: list[dict[str, float]] = []

    def on_metrics(values: dict[str, float]) -> None:
        metrics.append(values)
        if on_step is not None:
            on_step(int(values["step"]))

    result = train(partial(TinyRecipe, plan), settings, on_metrics, stop=stop)
    return Run(plan=plan, config=settings, metrics=metrics, result=result)
