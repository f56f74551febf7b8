"""One YAML file a job: what it is made of, never where it runs.

Paths are relative to the folder that `crab` is started in. Unknown keys are refused with the nearest known name.
`crab run SPEC --set a.b=c` changes one value; the resolved spec goes to MLflow and into the run's folder.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from crab.encoders import EncoderConfig
from crab.sampling import AudioSampling, VideoSampling
from crab_platform.identity import digest


class SpecError(ValueError):
    """The spec is wrong; the message says where, what was expected and what to do. Exit code 2."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_sqlite(uri: str) -> str:
    prefix = "sqlite:///"
    return prefix + _absolute(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri


Place = Annotated[str, AfterValidator(_absolute)]
"""A path or URL. Made absolute when the spec is read: workers stand in other folders."""


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
    tasks: dict[str, Literal["music-avqa"]] = {}
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
    store_as: Literal["float16", "bfloat16", "float32"] = "float16"


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
    uri: Annotated[str, AfterValidator(_absolute_sqlite)] = Field(
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


class PreprocessSpec(Job):
    """Clips become features in the cache, and a manifest of them."""

    job: Literal["preprocess"]
    data: list[DataSource] = Field(min_length=1)
    cache: Place
    """A folder or s3://bucket/prefix. Credentials and endpoint come from AWS_* environment variables."""
    sampling: Sampling = Sampling()
    encoders: Encoders = Encoders()
    decode: Decode = Decode()
    pipeline: Pipeline = Pipeline()


class Features(Record):
    """Cached features to read: which cache, and exactly which manifest of it."""

    cache: Place
    manifest: str
    """A manifest's digest, or the name of a preprocess job whose last manifest is meant."""
    tasks: dict[str, Literal["music-avqa"]] = {}
    """As `sampling.tasks` of the preprocess job."""


class Model(Record):
    """A preset and what differs from it, by the names of crab.model.config.CrabConfig."""

    preset: Literal["tiny", "paper"] = "tiny"
    llm: Place | None = None
    """Folder of another Hugging Face causal LM, with its tokenizer."""
    set: dict[str, Any] = {}
    """For example {"adapter": {"num_heads": 4}}."""


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


class Workers(Record):
    """How training is placed."""

    count: int = Field(default=2, ge=1)
    cpus: float = Field(default=1, gt=0)
    gpu: bool = False
    micro_batches: int = Field(default=1, ge=1)
    zero_stage: Literal[0, 2, 3] = 3
    checkpoint_every: int = Field(default=50, ge=1)
    max_failures: int = Field(default=3, ge=-1)


class TrainSpec(Job):
    """Cached features become an adapter with its projectors."""

    job: Literal["train"]
    data: list[DataSource] = Field(min_length=1)
    features: Features
    tasks: list[str] = Field(default=["ave", "avvp", "avqa"], min_length=1)
    model: Model = Model()
    optimisation: Optimisation
    workers: Workers = Workers()


class EvaluateSpec(Job):
    """The adapter answers the samples of a split, and is scored."""

    job: Literal["evaluate"]
    data: list[DataSource] = Field(min_length=1)
    features: Features
    tasks: list[str] = Field(default=["ave", "avvp", "avqa"], min_length=1)
    adapter: str
    """Folder of an exported adapter, or the name of a train job."""
    split: Literal["train", "val", "test"] = "test"
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=160, ge=1)
    samples_per_task: int | None = Field(default=None, ge=1)
    """The first so many of each task; all when left out."""
    device: str = "cpu"


class PretrainSpec(Job):
    """Makes the tiny preset: encoders, tokenizer and LLM, trained on AV-Shapes that are rendered on the fly."""

    job: Literal["pretrain"]
    out: Place
    """New folder for the weights (safetensors) and the tokenizer."""
    seed: int = Field(default=0, ge=0)
    clips: int = Field(default=8000, ge=10)
    """Scenes that are drawn; their seed is not that of any data set that `crab synth` writes."""
    vision_steps: int = Field(default=1500, ge=1)
    audio_steps: int = Field(default=600, ge=1)
    llm_steps: int = Field(default=2400, ge=1)
    batch_size: int = Field(default=32, ge=1)


Spec = PreprocessSpec | TrainSpec | EvaluateSpec | PretrainSpec
_SPEC: TypeAdapter[Spec] = TypeAdapter(
    Annotated[
        Union[PreprocessSpec, TrainSpec, EvaluateSpec, PretrainSpec],  # noqa: UP007 (Annotated wants a value)
        Field(discriminator="job"),
    ]
)
_KINDS: dict[str, type[Job]] = {
    "preprocess": PreprocessSpec,
    "train": TrainSpec,
    "evaluate": EvaluateSpec,
    "pretrain": PretrainSpec,
}


def load_spec(path: str | Path, changes: Sequence[str] = ()) -> Spec:
    """Reads, changes and checks a spec.

    Args:
        path: a YAML file.
        changes: "a.b=value" each; the value is read as YAML.

    Raises:
        SpecError: no such file, not YAML, or not a spec; says what was expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        known = sorted(str(p) for p in (Path(__file__).parent / "specs").glob("*.yaml"))
        raise SpecError(
            f"cannot read the spec {path}: {error}. The ones shipped: {known}"
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(
            f"{path}: expected a mapping with `job:` and `name:`, got {type(values).__name__}"
        )
    for change in changes:
        _apply(values, change)
    return parse_spec(values, str(path))


def parse_spec(values: Mapping[str, Any], where: str = "spec") -> Spec:
    """Checks a spec that was already read. Raises SpecError."""
    try:
        return _SPEC.validate_python(values)
    except ValidationError as error:
        raise SpecError(_explain(error, values, where)) from error


def spec_record(spec: Job) -> dict[str, Any]:
    """The resolved spec as plain values, for MLflow and the run's folder."""
    return spec.model_dump(mode="json")


def spec_digest(spec: Job, leave_out: Iterable[str]) -> str:
    """Digest of what a job means: the fields in `leave_out` (placement, tracking) do not count."""
    record = {name: value for name, value in spec_record(spec).items() if name not in leave_out}
    return digest(_without_floats(record))


def _without_floats(value: Any) -> Any:
    """Floats as their shortest exact text: canonical JSON takes none."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {name: _without_floats(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_floats(inner) for inner in value]
    return value


def _apply(values: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise SpecError(
            f"--set {change!r}: expected a.b=value, for example --set optimisation.steps=100"
        )
    *parents, last = path.split(".")
    for name in parents:
        below = values.setdefault(name, {})
        if not isinstance(below, dict):
            raise SpecError(f"--set {change!r}: {name} is {below!r}, not a mapping")
        values = below
    values[last] = yaml.safe_load(text)


def _explain(error: ValidationError, values: Mapping[str, Any], where: str) -> str:
    kind = values.get("job")
    lines = [f"{where}: {error.error_count()} problem(s)"]
    for problem in error.errors():
        location = [str(part) for part in problem["loc"] if part != kind]
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            names = _fields_at(_KINDS.get(str(kind)), location[:-1])
            near = difflib.get_close_matches(location[-1], names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
            message = f"unknown key; {hint}"
        elif problem["type"].startswith("union_tag"):
            location, message = ["job"], f"is {kind!r}; expected one of {', '.join(_KINDS)}"
        lines.append(f"  {'.'.join(location) or 'spec'}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel] | None, path: Sequence[str]) -> list[str]:
    for name in path:
        if model is None or name.isdigit():
            continue
        field = model.model_fields.get(name)
        model = next(iter(_models_in(field.annotation)), None) if field else None
    return sorted(model.model_fields) if model else []


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
