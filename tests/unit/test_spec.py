"""Specs: what is refused, how it is said, and what counts as the same job."""

import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from crab.tasks import TASKS
from jobs import preprocess
from jobs.plan import plan_spec
from jobs.presets import crab_model_config, encoder_configs
from jobs.spec import (
    EvaluateSpec,
    PreprocessSpec,
    ReportSpec,
    SequenceSpec,
    SpecError,
    TrainSpec,
    load_spec,
    parse_spec,
    spec_digest,
)

SPECS = sorted((Path(__file__).parents[2] / "jobs" / "specs").glob("*.yaml"))
TRAIN = {
    "job": "train",
    "name": "a",
    "data": [{"name": "d", "samples": "s.jsonl"}],
    "features": {"cache": "c", "manifest": "m"},
    "optimisation": {"steps": 2, "batch_size": 4},
}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_shipped_is_valid(path: Path) -> None:
    assert load_spec(path).name == path.stem


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimisation.step=3", "optimisation.step: unknown key; did you mean 'steps'"),
        ("optimization.steps=3", "did you mean 'optimisation'"),
        ("workers.zzz=1", "known here: activation_checkpointing, changed_data, checkpoint_every"),
        ("optimisation.steps=0", "greater than or equal to 1"),
        ("workers.min_count=3", "at least 3 workers are more than at most 2"),
        ("job=tain", "job: is 'tain'; expected one of synth, preprocess, train"),
        ("job=", "job: is 'None'; expected one of synth"),
        ("tasks=[ave, avqqa]", "tasks: 'avqqa' is no task; known are ave"),
        ("tasks=[]", "at least 1 item"),
        ("optimisation.sampling=evenly", "optimisation.sampling"),
        ("optimisation.sampling={s4: 0}", "greater than 0"),
        ("optimisation.sampling={s5: 1}", "weighs s5, which is not among tasks: ave"),
        ("optimisation.batches=flat", "'packed' or 'padded'"),
        ("workers.prefetch=-1", "workers.prefetch"),
        ("data.d.sample=3", "data.d.sample: unknown key; did you mean 'samples'"),
        ("data.e.samples=3", "no e in the list; it holds d"),
        ("workers=3", "workers"),
        ("optimisation.steps", "expected a.b=value"),
        ("name=Not Allowed", "name: is 'Not Allowed'; names are of a-z"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(str(TRAIN).replace("'", '"'))  # JSON is YAML
    with pytest.raises(SpecError) as error:
        load_spec(path, [change])
    assert said in str(error.value)


def test_a_step_of_a_sequence_is_changed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    steps = [{"job": "report", "name": "r", "run": "e"}, TRAIN]
    path.write_text(str({"job": "sequence", "name": "all", "steps": steps}).replace("'", '"'))
    spec = load_spec(path, ["steps.a.optimisation.steps=7", "steps.0.examples=2"])
    assert isinstance(spec, SequenceSpec)
    report, train = spec.steps
    assert isinstance(report, ReportSpec)
    assert isinstance(train, TrainSpec)
    assert (report.examples, train.optimisation.steps) == (2, 7)
    for change, said in (
        ("steps.a.optimisation.step=3", "steps.a.optimisation.step: unknown key; did you mean"),
        ("steps.r.exampels=3", "steps.r.exampels: unknown key; did you mean 'examples'"),
        ("steps.0.job=none", "steps.r.job: is 'none'; expected one of synth"),
        ("steps.b.run=3", "no b in the list; it holds r, a"),
        ("steps.5.run=3", "no 5 in the list"),
    ):
        with pytest.raises(SpecError) as error:
            load_spec(path, [change])
        assert said in str(error.value)


def test_all_tasks_are_meant_where_none_are_named() -> None:
    spec = parse_spec(TRAIN)
    assert isinstance(spec, TrainSpec)
    assert spec.tasks == list(TASKS)


def test_a_spec_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"train-shapes\.yaml"):
        load_spec(tmp_path / "nothing.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("job: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(SpecError, match="not YAML"):
        load_spec(path)


def test_paths_become_absolute_and_urls_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_spec(TRAIN | {"features": {"cache": "s3://b/p", "manifest": "m"}})
    assert isinstance(spec, TrainSpec)
    assert spec.features.cache.url == "s3://b/p"
    assert spec.data[0].samples == str(tmp_path / "s.jsonl")
    assert spec.runs == str(tmp_path / "work" / "runs")
    assert spec.tracking.uri == f"sqlite:///{tmp_path}/work/mlflow.db"


def test_placement_is_not_identity() -> None:
    def identity(**changes: object) -> str:
        spec = parse_spec(TRAIN | changes)
        return spec_digest(spec, ("name", "runs", "tracking", "workers", "features"))

    assert identity() == identity(name="b", runs="elsewhere", workers={"count": 4})
    assert identity() != identity(optimisation={"steps": 2, "batch_size": 4, "seed": 1})
    assert identity() != identity(
        optimisation={"steps": 2, "batch_size": 4, "sampling": "balanced"}
    )
    padded = {"steps": 2, "batch_size": 4, "batches": "padded"}
    assert identity() != identity(optimisation=padded)
    assert identity() == identity(workers={"prefetch": 0})
    assert identity() != identity(tasks=["ave"])
    assert identity() != identity(model={"set": {"adapter": {"num_heads": 2}}})


def test_a_model_is_a_preset_and_what_differs() -> None:
    spec = parse_spec(TRAIN | {"model": {"set": {"adapter": {"num_heads": 5}}}})
    assert isinstance(spec, TrainSpec)
    config = crab_model_config(spec.model)
    assert config.adapter.num_heads == 5
    assert config.adapter.r == 8
    with pytest.raises(ValueError, match="num_head"):
        crab_model_config(spec.model.model_copy(update={"set": {"adapter": {"num_head": 5}}}))


@pytest.mark.parametrize("preset", ["paper", None])
def test_without_weights_the_error_says_what_works(preset: str | None, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    values = {"job": "preprocess", "name": "a", "data": [{"name": "d", "files": "."}], "cache": "c"}
    path.write_text(yaml.safe_dump(values | {"encoders": {"preset": preset}}))
    spec = load_spec(path)
    assert isinstance(spec, PreprocessSpec)
    with pytest.raises(SpecError, match="no weights") as raised:
        encoder_configs(spec.encoders)
    assert "None" not in str(raised.value)
    words = shlex.split(str(raised.value))
    advice = [value for name, value in pairwise(words) if name == "--set"]
    assert len(advice) == 2
    spec = load_spec(path, advice)
    assert isinstance(spec, PreprocessSpec)
    video, audio = encoder_configs(spec.encoders)
    assert (video.kind, audio.kind) == ("clip", "beats")


@pytest.mark.parametrize(
    ("zone", "said"), [("", "signs nothing"), ("audio", "signs as 'audio'"), ("vision", None)]
)
@pytest.mark.parametrize("go", [preprocess.run, plan_spec])
def test_a_job_that_writes_must_trust_what_it_signs(
    zone: str, said: str | None, go: Callable[[PreprocessSpec], object], tmp_path: Path
) -> None:
    cache = {"url": "c", "zone": zone, "trust": {"vision": "0" * 64}}
    data = [{"name": "d", "samples": str(tmp_path / "s.jsonl")}]
    values = {"job": "preprocess", "name": "a", "data": data, "cache": cache}
    spec = parse_spec(values)
    assert isinstance(spec, PreprocessSpec)
    with pytest.raises(SpecError, match=said or "s.jsonl"):
        go(spec)


def test_an_evaluation_takes_one_split() -> None:
    with pytest.raises(SpecError, match="split"):
        parse_spec(
            {
                "job": "evaluate",
                "name": "a",
                "data": [{"name": "d", "samples": "s"}],
                "features": {"cache": "c", "manifest": "m"},
                "adapter": "t",
                "split": "everything",
            }
        )
    assert EvaluateSpec.model_fields["split"].default == "test"


def test_fewer_workers_must_share_the_parts_of_a_batch_evenly() -> None:
    workers = {"count": 4, "min_count": 2, "micro_batches": 1}
    with pytest.raises(
        SpecError, match=r"4 parts of a batch, which 3 workers cannot .* take micro_batches: 3"
    ):
        parse_spec(TRAIN | {"workers": workers})
    parse_spec(TRAIN | {"workers": workers | {"micro_batches": 3}})
    parse_spec(TRAIN | {"workers": {"count": 2, "min_count": 1}})
