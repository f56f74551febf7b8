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
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from crab.encoders.config import EncoderConfig
from crab.sampling import AudioSampling, VideoSampling
from crab_platform.identity import digest
from jobs.spec_base import Place as Place
from jobs.spec_base import Record as Record
from jobs.spec_cache import CachePlace, DecodedWindows
from jobs.spec_common import DataSource as DataSource
from jobs.spec_common import Features as Features
from jobs.spec_common import Job as Job
from jobs.spec_common import Tasks
from jobs.spec_errors import SpecError as SpecError
from jobs.spec_errors import explain
from jobs.spec_train import Model as Model
from jobs.spec_train import TrainSpec as TrainSpec
from jobs.spec_tune import TuneSpec as TuneSpec
from jobs.spec_yaml import read_yaml


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


Step = SynthSpec | PreprocessSpec | TrainSpec | TuneSpec | EvaluateSpec | ReportSpec | PretrainSpec
"""A job that does one thing."""
_KINDS: dict[str, type[Job]] = {
    "synth": SynthSpec,
    "preprocess": PreprocessSpec,
    "train": TrainSpec,
    "tune": TuneSpec,
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
        spec = _SPEC.validate_python(values)
    except ValidationError as error:
        raise SpecError(explain(error, values, where, KINDS)) from error
    if isinstance(spec, TuneSpec) and isinstance(spec.preprocess, dict):
        first = parse_spec(spec.preprocess, f"{where}: preprocess")
        if first.job != "preprocess":
            raise SpecError(f"{where}: preprocess is a {first.job} job; expected a preprocess job")
    return spec


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
