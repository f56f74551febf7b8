"""The spec of a train job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from crab_platform import elastic, offload
from crab_platform.offload import Offload
from jobs.spec_base import Place, Record
from jobs.spec_common import DataSource, Features, Job, Tasks


class Model(Record):
    """A preset and what differs from it, by the names of crab.model.config.CrabConfig."""

    preset: Literal["tiny", "paper"] = "tiny"
    llm: Place | None = None
    """Folder of another Hugging Face causal LM, with its tokenizer."""
    set: dict[str, Any] = Field(default_factory=dict)
    """For example {"adapter": {"num_heads": 4}}."""


TaskWeight = Annotated[float, Field(gt=0)]


class Optimisation(Record):
    """What is learnt and how. All of it is identity."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Samples of one optimizer step, over all workers and micro batches."""
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    seed: int = Field(default=42, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    sampling: Literal["proportional", "balanced"] | dict[str, TaskWeight] = "proportional"
    """Which samples a step takes: each as often as any other, each task as often as any other, or tasks by weight
    (a task that is not named has weight 1)."""
    batches: Literal["packed", "padded"] = "packed"
    """How samples stand in a micro batch: one after the other without padding, or each in a row that is padded to the
    longest. Both learn the same but for rounding and dropout; `padded` is for language models that cannot keep packed
    samples apart."""


class Workers(Record):
    """How training is placed."""

    count: int = Field(default=2, ge=1)
    min_count: int | None = Field(default=None, ge=1)
    """So few workers will do where the cluster has no room for `count`; each then takes more micro batches, and what is
    learnt stays the same. Without it, a run waits for room."""
    cpus: float = Field(default=1, gt=0)
    gpu: bool = False
    micro_batches: int = Field(default=1, ge=1)
    zero_stage: Literal[0, 2, 3] = 3
    offload: Offload = "none"
    """What lies in the host's memory instead of the GPU's: Adam's state (ZeRO-2 and 3), or all weights as well (3)."""
    activation_checkpointing: bool = False
    """Backward computes each layer of the language model again: less memory, a third more work, the same bits."""
    health_every: int = Field(default=10, ge=0)
    """Every so many steps the metrics say how the adapter's routers use their heads; 0 for never."""
    checkpoint_every: int = Field(default=50, ge=1)
    max_failures: int = Field(default=3, ge=-1)
    prefetch: int = Field(default=2, ge=0)
    """So many micro batches are read and made ready ahead of time, by a thread in each worker; 0: no thread."""
    changed_data: Literal["refuse", "continue"] = "refuse"
    """What is done where a checkpoint of this run has learnt from other samples or features than there are now."""

    @model_validator(mode="after")
    def _can_offload(self) -> Workers:
        if objection := offload.objection(self.offload, self.zero_stage):
            raise ValueError(objection)
        return self

    @model_validator(mode="after")
    def _can_be_fewer(self) -> Workers:
        if objection := elastic.objection(self.min_count, self.count, self.micro_batches):
            raise ValueError(objection)
        return self


class Validation(Record):
    """What is held out of training, and how often the loss on it is measured (metrics `val/...`)."""

    samples_per_task: int = Field(default=16, ge=1)
    """They come from the split val, or else are kept out of training (at most a tenth of a task's samples)."""
    every: int = Field(default=50, ge=1)
    """Steps; also after the last one."""


class TrainSpec(Job):
    """Cached features become an adapter with its projectors."""

    job: Literal["train"]
    data: list[DataSource] = Field(min_length=1)
    features: Features
    tasks: Tasks
    model: Model = Model()
    optimisation: Optimisation
    workers: Workers = Workers()
    validation: Validation | None = None
    parse_rate_samples: int = Field(default=4, ge=0)
    """So many samples of each task are answered at the end, to log how many answers can be read; 0 for none. They come
    from the split val, or else are kept out of training (at most a tenth of a task's samples)."""

    @model_validator(mode="after")
    def _weights_of_its_tasks(self) -> TrainSpec:
        weights = self.optimisation.sampling
        if not isinstance(weights, str) and (strange := sorted(weights.keys() - set(self.tasks))):
            raise ValueError(
                f"optimisation.sampling weighs {', '.join(strange)}, which is not among tasks: "
                f"{', '.join(self.tasks)}"
            )
        return self
