"""What a training run is given: a recipe, and how it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from crab_platform import elastic, offload
from crab_platform.offload import Offload


class Recipe(Protocol):
    """What a worker trains. Built once per worker process, after the process group is up."""

    model: torch.nn.Module
    num_steps: int
    data: str
    """Digest of the samples and features that are learnt from: a checkpoint of other data is refused."""

    def parameters(self) -> list[dict[str, Any]]:
        """Optimizer parameter groups; only parameters that are trained."""
        ...

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based)."""
        ...

    def micro_batches(self, step: int, rank: int, world_size: int) -> Iterator[Any]:
        """The batches of one optimizer step on one rank: the same number on every rank and at every step."""
        ...

    def loss(
        self, model: torch.nn.Module, batch: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(share of this batch in the loss of the global step, sums to be added over ranks and micro batches).

        Added up over all micro batches of all ranks, the losses give the loss of the step. Sums may have any shape; in
        one step all ranks and micro batches give the same names and shapes.
        """
        ...

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, float]:
        """Metrics of a step from the sums of `loss`, added over all micro batches and ranks: floats, or float64 tensors
        on the CPU where they were no scalars. `tokens` and `supervised_tokens` (numbers of a step) become rates too."""
        ...

    def validation_batches(self, rank: int, world_size: int) -> Iterator[Any]:
        """Batches for `loss` of what is held out, the same number on every rank, at least one; only asked for where the
        configuration says `validate_every`. Added up over all of them, their losses give the loss of what is held out.
        """
        ...

    def seed(self, step: int, micro: int, rank: int) -> int:
        """Seed of the random numbers (dropout) that one micro batch draws."""
        ...

    def export(self, state: Mapping[str, torch.Tensor], step: int) -> None:
        """Called on rank 0 after the last step with the full trained parameters by name, on the CPU.

        Called again if the run is killed before it has ended, or started again when it has: it must replace what is
        there.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a recipe is run. Nothing here changes what is learnt, except `zero_stage` and `dtype` by rounding."""

    name: str
    storage_path: str
    """Folder or bucket URL that every worker reaches; the run's checkpoints lie in storage_path/name."""
    num_workers: int = 2
    min_workers: int | None = None
    """So few will do where there is no room for `num_workers` (elastic.py)."""
    cpus_per_worker: float = 1
    use_gpu: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 1
    """Samples a rank in a micro batch. DeepSpeed only wants to know it for its own throughput figures."""
    zero_stage: Literal[0, 2, 3] = 3
    offload: Offload = "none"
    """What lies in the host's memory instead of the GPU's. Without a GPU that is the same memory."""
    whole_below: int = 1_000_000
    """ZeRO-3 keeps parameters of at most so many elements whole on every worker."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    write_timeout_s: float = 600.0
    """How long the end of a run, or a notice of preemption, waits for the last checkpoint to be written."""
    hang_timeout_s: float = 50.0
    """Workers that all wait this long in a micro batch, or in ten times the longest before if that is more, hang: they
    are killed and started again, which counts as a failure."""
    changed_data: Literal["refuse", "continue"] = "refuse"
    """What is done with a checkpoint that has learnt from other data than there is now."""
    validate_every: int = 0
    """Every so many steps, and after the last, the metrics tell the loss of what is held out; 0 for never."""
    stop_after: int | None = None
    """The run ends after this step with a checkpoint and no export, if it has more steps than that: a part of a run."""
    log_every: int = 1
    max_failures: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "num_workers",
            "micro_batches",
            "micro_batch_size",
            "checkpoint_every",
            "log_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.whole_below < 0:
            raise ValueError(f"whole_below must be at least 0, got {self.whole_below}")
        for objection in (
            offload.objection(self.offload, self.zero_stage),
            elastic.objection(self.min_workers, self.num_workers, self.micro_batches),
        ):
            if objection is not None:
                raise ValueError(objection)

    def with_workers(self, count: int) -> TrainingConfig:
        """The same run by `count` workers: each takes as many more parts of a batch as they are fewer."""
        parts, left = divmod(self.num_workers * self.micro_batches, count)
        if left:
            raise ValueError(
                f"{count} workers cannot share {self.num_workers * self.micro_batches} parts evenly"
            )
        return replace(self, num_workers=count, micro_batches=parts, min_workers=None)

    @property
    def run(self) -> str:
        """The run's own folder, a path or URL."""
        return f"{self.storage_path.rstrip('/')}/{self.name}"


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Matrices of the adapter are kept whole on every rank: gathering them again
    and again costs more than their memory (`stage3_param_persistence_threshold`). At the paper's size 14 larger ones of
    the projectors and the mask decoder are sharded; a threshold that kept them would keep frozen ones too."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        # DeepSpeed sets this memory aside on every worker; its own default is ten times as much.
        "reduce_bucket_size": 50_000_000,
        "overlap_comm": config.use_gpu,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.whole_below,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    zero |= offload.zero_settings(config.offload, use_gpu=config.use_gpu)
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
