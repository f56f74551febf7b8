"""A recipe for crab_platform.training: a small random Crab, sixteen invented samples with and without masks, and faults
to order.

Top-level functions and frozen records only: Ray Train's workers import this file and build the recipe themselves.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tiny_crab import config, example, mask_example, plain_llm, tokenizer

from crab import train as schedule
from crab.model.artifact import save_model
from crab.model.build import build_model
from crab.model.collate import Collator
from crab.model.config import CrabConfig, LlmConfig
from crab.model.crab_model import CrabModel
from crab.model.llm import load_tokenizer
from crab_platform.training import TrainingConfig, TrainingResult, train

NUM_SAMPLES = 16
GLOBAL_BATCH = 4


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
    seed: int = 12
    """With it one rank has masks in the first micro batch of all and the other has none, where ZeRO-3 is most easily
    led astray: weights that stay for good are not gathered yet."""
    kill_at: int | None = None
    """The last rank kills itself in the middle of this step (0-based), once."""
    hold_at: int | None = None
    """The last rank stops for good in the middle of this step, once; somebody will kill it."""
    forgets: Literal["dropout", "data"] | None = None
    """Planted bug: draws from a generator of the process, or counts its own batches, instead of asking the step."""


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
        self.num_steps = plan.steps
        settings = crab_config(plan)
        self.tokenizer = load_tokenizer(plan.llm)
        self.model: CrabModel = build_model(settings, self.tokenizer)
        self._collate = Collator(settings, self.tokenizer, self.model.table)
        self._own_count = itertools.count()
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
        with (self._out / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def parameters(self) -> list[dict[str, Any]]:
        return schedule.parameter_groups(self.model.trainable_parameters())

    def learning_rate(self, step: int) -> float:
        # 0 in the last step: what its forward shows is what is exported.
        return schedule.cosine_lr(step, num_steps=self.plan.steps - 1, peak=5e-3)

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        if self.plan.forgets == "data":
            step = next(self._own_count)
        indices = schedule.batch_indices(self.plan.seed, step, GLOBAL_BATCH, NUM_SAMPLES)
        samples = [self._examples[i].sample for i in indices]
        tokens = sum(self._collate.num_target_tokens(sample) for sample in samples)
        frames = sum(self._collate.num_mask_frames(sample) for sample in samples)
        mine = schedule.rank_slice(indices, rank, world_size)
        for part in schedule.micro_batches(mine, GLOBAL_BATCH // self.plan.parts):
            yield {
                "tensors": self._collate([self._examples[i] for i in part]),
                "normalizers": (float(tokens), float(frames)),
                "rank": rank,
                "step": step,
            }
            if rank == world_size - 1:
                self._fault(step)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with recorded_logits(self.model) as logits:
            output = model(batch["tensors"], *batch["normalizers"])
        if batch["step"] == self.num_steps - 1 and batch["rank"] == 0:
            torch.save({"batch": batch["tensors"], "logits": logits[0]}, self._out / "probe.pt")
        return output["loss"], {
            "tokens": output["sample_tokens"].sum(),
            "mask_frames": output["sample_mask_frames"].sum(),
            "mask_loss": output["sample_mask_loss"].sum(),
        }

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {name: sums[name] for name in ("tokens", "mask_frames", "mask_loss")}

    def seed(self, step: int, micro: int, rank: int) -> int:
        if self.plan.forgets == "dropout":
            return next(self._own_count)
        parts_a_rank = self.plan.parts // torch.distributed.get_world_size()
        return schedule.step_seed(self.plan.seed, step, rank * parts_a_rank + micro)

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        folder = self._out / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        save_model(self.model, self.tokenizer, folder, state=state, lineage={"step": step})

    def _fault(self, step: int) -> None:
        """Between two micro batches, when gradients of the step are there and its update is not."""
        if self.plan.kill_at == step and not (self._out / "killed").exists():
            (self._out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.plan.hold_at == step and not (self._out / "held").exists():
            (self._out / "held").touch()
            time.sleep(3600)


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

    def checkpoint(self, step: int) -> Path:
        (folder,) = self.folder.glob(f"checkpoint_{step:08d}_*")
        return folder

    def exported(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        adapter = Path(self.plan.out) / "adapter"
        files = ("trained.safetensors", "adapter/adapter_model.safetensors")
        return {f"{file}:{k}": v for file in files for k, v in load_file(adapter / file).items()}


def run(plan: Plan, **changes: Any) -> Run:
    """Trains `plan`; to be called inside a connection to Ray. The checkpoints lie beside its output."""
    settings = TrainingConfig(
        name="run", storage_path=plan.out, checkpoint_every=2, keep_checkpoints=10, max_failures=1
    )
    settings = replace(settings, **changes)
    metrics: list[dict[str, float]] = []
    result = train(partial(TinyRecipe, plan), settings, metrics.append)
    return Run(plan=plan, config=settings, metrics=metrics, result=result)
