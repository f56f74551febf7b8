"""One YAML file a job: what it is made of, never where it runs.

Paths are relative to the folder that `crab` is started in. Unknown keys are refused with the nearest known name.
`crab run SPEC --set a.b=c` changes one value; the resolved spec goes to MLflow and into the run's folder.
A `sequence` holds whole specs of other jobs as its steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from crab.encoders.config import EncoderConfig
from crab.sampling import AudioSampling, VideoSampling
from crab.tasks import TASKS
from crab_platform import elastic, offload
from crab_platform.identity import digest
from crab_platform.offload import Offload
from jobs.spec_base import Place as Place
from jobs.spec_base import Record as Record
from jobs.spec_base import absolute_sqlite
from jobs.spec_cache import CachePlace, DecodedWindows
from jobs.spec_errors import SpecError as SpecError
from jobs.spec_errors import explain
from jobs.spec_yaml import read_yaml


def _known_tasks(names: list[str]) -> list[str]:
    for name in names:
        if name not in TASKS:
            raise ValueError(f"{name!r} is no task; known are {', '.join(TASKS)}")
    return names


Tasks = Annotated[
    list[str],
    AfterValidator(_known_tasks),
    Field(default_factory=lambda: list(TASKS), min_length=1),
]
"""Names of tasks; all when left out."""


class DataSource(Record):
    """Clips and what is asked about them, or loose media files."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Stands in manifests instead of the folder, so that a data set has the same name on every machine."""
    samples: Place | None = None
    """A samples.jsonl, or the samples.json of Crab's own examples."""
    files: Place | None = None
    """A folder: every file below it, each with the streams that its kind has."""

    @model_validator(mode="after")
    def _one(self) -> DataSource:
        if (self.samples is None) == (self.files is None):
            raise ValueError(f"data source {self.name!r}: give either samples or files")
        return self


class Sampling(Record):
    """Which moments of a clip are decoded. Part of every key."""

    num_frames: int = Field(default=10, ge=1)
    num_segments: int = Field(default=10, ge=1)
    segment_ms: int = Field(default=1000, ge=1)
    stride_ms: int = Field(default=1000, ge=1)
    offset_ms: int = 0
    tasks: dict[str, Literal["music-avqa"]] = Field(default_factory=dict)
    """Tasks that are sampled in another way: `avqa: music-avqa` takes 2 s windows over 60 s of audio."""

    def video(self, size: int) -> VideoSampling:
        return VideoSampling(num_frames=self.num_frames, size=size)

    def audio(self) -> AudioSampling:
        return AudioSampling(
            num_segments=self.num_segments,
            segment_ms=self.segment_ms,
            stride_ms=self.stride_ms,
            offset_ms=self.offset_ms,
        )


class Encoders(Record):
    """The frozen encoders. `preset: tiny` are the ones in this repository."""

    preset: Literal["tiny", "paper"] | None = "tiny"
    video: EncoderConfig | None = None
    audio: EncoderConfig | None = None
    """Given in full, they replace those of the preset. `paper` has no weights of its own: name both paths."""
    store_as: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Type of stored features. `int8` has one scale for every token."""
    codec: Literal["raw", "blosc2-shuffle-zstd1"] = "raw"
    """Lossless compression of stored features: for a store that is slow or dear, by `make bench-dtypes`."""


class Decode(Record):
    """Limits of one clip in its own process; past them the clip is set aside, and nothing else is lost."""

    timeout_s: float = Field(default=60, gt=0)
    memory_mb: int = Field(default=2048, ge=256)
    clips_per_process: int = Field(default=100, ge=1)
    """A decoding process is replaced after so many clips: native decoders leak."""


class Pipeline(Record):
    """How the work is placed on the cluster. Never part of a key."""

    mode: Literal["fused", "split"] = "fused"
    encode_actors: int = Field(default=1, ge=1)
    decode_tasks: int = Field(default=1, ge=1)
    decode_processes: int = Field(default=1, ge=1)
    encode_cpus: float = Field(default=1, gt=0)
    encode_gpus: float = Field(default=0, ge=0)
    clips_per_pack: int = Field(default=64, ge=1)
    clips_per_decode: int = Field(default=8, ge=1)


class Tracking(Record):
    uri: Annotated[str, AfterValidator(absolute_sqlite)] = Field(
        default="sqlite:///work/mlflow.db", validate_default=True
    )
    experiment: str = "crab"


class Job(Record):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    runs: Place = Field(default="work/runs", validate_default=True)
    """Folder of all runs; this one's is runs/name."""
    tracking: Tracking = Field(default_factory=Tracking)

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


class SynthSpec(Job):
    """Makes AV-Shapes, as `crab synth` does: clips that are there already are not made again."""

    job: Literal["synth"]
    out: Place
    """Folder of the data set; `clips` may be raised later, `seed` may not change."""
    clips: int = Field(default=200, ge=1)
    seed: int = Field(default=1, ge=0)


class PreprocessSpec(Job):
    """Clips become features in the cache, and a manifest of them."""

    job: Literal["preprocess"]
    data: list[DataSource] = Field(min_length=1)
    cache: CachePlace
    """A folder or s3://bucket/prefix, or more about it: whom to trust, what to read through, a local tier."""
    decoded_windows: DecodedWindows | None = None
    """Keep what was decoded as well, so that another encoder need not decode again."""
    sampling: Sampling = Sampling()
    encoders: Encoders = Encoders()
    decode: Decode = Decode()
    pipeline: Pipeline = Pipeline()


class Features(Record):
    """Cached features to read: which cache, and exactly which manifest of it."""

    cache: CachePlace
    manifest: str
    """A manifest's digest, or the name of a preprocess job whose last manifest is meant."""
    tasks: dict[str, Literal["music-avqa"]] = Field(default_factory=dict)
    """As `sampling.tasks` of the preprocess job."""


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


class TrainSpec(Job):
    """Cached features become an adapter with its projectors."""

    job: Literal["train"]
    data: list[DataSource] = Field(min_length=1)
    features: Features
    tasks: Tasks
    model: Model = Model()
    optimisation: Optimisation
    workers: Workers = Workers()
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


class EvaluateSpec(Job):
    """The adapter answers the samples of a split, and is scored."""

    job: Literal["evaluate"]
    data: list[DataSource] = Field(min_length=1)
    features: Features
    tasks: Tasks
    adapter: str
    """Folder of an exported adapter, or the name of a train job."""
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=400, ge=1)
    """An answer that is not ended by then is cut. Masks of a busy clip take 300: ten for each change of what sounds."""
    samples_per_task: int | None = Field(default=None, ge=1)
    """The first so many of each task; all when left out."""
    workers: int = Field(default=2, ge=1)
    """Processes that answer side by side, each with the whole model, on one CPU core or (device cuda) one GPU each."""
    device: str = "cpu"


class PretrainSpec(Job):
    """Makes the tiny preset, encoders to mask decoder, from AV-Shapes that are rendered in memory."""

    job: Literal["pretrain"]
    out: Place
    """Folder for the stages and, at the end, `preset`. Stages that are there are not done again."""
    seed: int = Field(default=0, ge=0)
    clips: int = Field(default=24000, ge=10)
    """Scenes that are drawn; their seed is not that of any data set that `crab synth` writes."""
    feature_clips: int = Field(default=1500, ge=1)
    """The first so many of them go through both encoders; about 1 MB each on the disk."""
    vision_steps: int = Field(default=2000, ge=1)
    audio_steps: int = Field(default=600, ge=1)
    llm_steps: int = Field(default=4000, ge=1)
    projector_steps: int = Field(default=1000, ge=1)
    mask_steps: int = Field(default=600, ge=1)
    joint_steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=14, ge=1)
    """Scenes of a step where the LLM learns; the other stages have their own."""


class ReportSpec(Job):
    """A page to look at: scores beside baselines, and examples of each task, the worst first."""

    job: Literal["report"]
    run: str
    """Name of a finished evaluate job."""
    examples: int = Field(default=6, ge=1)
    """Of each task."""


Step = SynthSpec | PreprocessSpec | TrainSpec | EvaluateSpec | ReportSpec | PretrainSpec
"""A job that does one thing."""
_KINDS: dict[str, type[Job]] = {
    "synth": SynthSpec,
    "preprocess": PreprocessSpec,
    "train": TrainSpec,
    "evaluate": EvaluateSpec,
    "report": ReportSpec,
    "pretrain": PretrainSpec,
}


class SequenceSpec(Job):
    """Jobs one after the other. Started again after a failure, each step that is done says so and costs little.

    `runs` and `tracking` hold for the steps that do not name their own.
    """

    job: Literal["sequence"]
    steps: list[Annotated[Step, Field(discriminator="job")]] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, values: Any) -> Any:
        steps = values.get("steps") if isinstance(values, Mapping) else None
        if not isinstance(steps, list):
            return values
        common = {name: values[name] for name in ("runs", "tracking") if name in values}
        filled = [{**common, **step} if isinstance(step, Mapping) else step for step in steps]
        return {**values, "steps": filled}

    @model_validator(mode="after")
    def _names_are_unique(self) -> SequenceSpec:
        names = Counter([self.name, *(step.name for step in self.steps)])
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"each job needs a name of its own; used twice: {', '.join(twice)}")
        return self


Spec = Step | SequenceSpec
_SPEC: TypeAdapter[Spec] = TypeAdapter(
    Annotated[
        Union[Step, SequenceSpec],  # noqa: UP007 (Annotated wants a value)
        Field(discriminator="job"),
    ]
)
KINDS = _KINDS | {"sequence": SequenceSpec}
"""The models of specs by what stands under `job:`."""


def load_spec(path: str | Path, changes: Sequence[str] = ()) -> Spec:
    """Reads, changes and checks a spec.

    Args:
        path: a YAML file.
        changes: "a.b=value" each; the value is read as YAML.

    Raises:
        SpecError: no such file, not YAML, or not a spec; says what was expected.
    """
    return parse_spec(read_yaml(path, changes), str(path))


def parse_spec(values: Mapping[str, Any], where: str = "spec") -> Spec:
    """Checks a spec that was already read. Raises SpecError."""
    try:
        return _SPEC.validate_python(values)
    except ValidationError as error:
        raise SpecError(explain(error, values, where, KINDS)) from error


def spec_record(spec: Job) -> dict[str, Any]:
    """The resolved spec as plain values, for MLflow and the run's folder."""
    return spec.model_dump(mode="json")


def spec_digest(spec: Job, leave_out: Iterable[str]) -> str:
    """Digest of what a job means: the fields in `leave_out` (placement, tracking) do not count."""
    record = {name: value for name, value in spec_record(spec).items() if name not in leave_out}
    return record_digest(record)


def record_digest(record: Mapping[str, Any]) -> str:
    """Digest of plain values, floats among them."""
    return digest(_without_floats(dict(record)))


def _without_floats(value: Any) -> Any:
    """Floats as their shortest exact text: canonical JSON takes none."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {name: _without_floats(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_floats(inner) for inner in value]
    return value
