"""F7 of reference/reliability.md: specs and profiles that are right are all accepted, and those that are wrong refused.

Before anything is sent, with the place and the way out.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.crd import errors
from support.pod_security import violations

from crab_platform.cost import ProfileError
from crab_platform.rayjob_rules import objections
from jobs.spec import SpecError, TuneSpec, parse_spec
from jobs.submit import manifest_of

SPECS = sorted(path.stem for path in Path("jobs/specs").glob("*.yaml"))
SMALL = {"cpus": 4, "memory_gib": 8}
GPU = SMALL | {"gpus": 1, "max_pods": 4}
MIG = GPU | {"gpu_resource": "nvidia.com/mig-1g.10gb"}
PROFILES: list[dict[str, Any]] = [
    {},
    {"queue": None},
    {"queue": {"name": "team", "elastic": True}},
    {"node_groups": {"head": SMALL, "cpu": SMALL | {"max_pods": 40}}},
    {"node_groups": {"head": SMALL, "gpu": GPU | {"cpus": 40}}, "queue": None},
    {"node_groups": {"head": SMALL, "cpu": SMALL | {"max_pods": 40, "spot": True}, "gpu": MIG}},
    {"image_pull_secret": "registry", "secrets": {"HF_TOKEN": {"secret": "hf", "key": "token"}}},
    {"limits": {"retries": 0, "hours": 1, "start_minutes": 1, "keep_minutes": 1}, "queue": None},
    {"environment": {"AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "https://s3.example.com"}},
    {"mlflow": {"uri": "http://mlflow.crab.svc:5000"}, "bucket": "s3://another-bucket"},
]
TRAIN, PREPROCESS, TUNE = "train-shapes", "preprocess-shapes", "tune-heads"
WRONG: list[tuple[str, list[str], dict[str, Any], str]] = [
    (TRAIN, [], {"image": "crab"}, "no image by digest"),
    (TRAIN, [], {"image": "crab:1.0"}, "no image by digest"),
    (TRAIN, [], {"image": "crab@sha256:abc"}, "no image by digest"),
    (TRAIN, [], {"image_pull_secret": "A_B"}, "image_pull_secret"),
    (TRAIN, [], {"ray_version": "2.51.9"}, "2.52.0"),
    (TRAIN, [], {"ray_version": "latest"}, "ray_version"),
    (TRAIN, [], {"namespace": ""}, "namespace"),
    (TRAIN, [], {"namespace": "a" * 64}, "namespace"),
    (TRAIN, [], {"namespace": "Crab"}, "namespace"),
    (TRAIN, [], {"service_account": "a b"}, "service_account"),
    (TRAIN, [], {"auth_secret": "-a"}, "auth_secret"),
    (TRAIN, [], {"workspace": "a/b"}, "workspace"),
    (TRAIN, [], {"bucket": "crab"}, "bucket"),
    (TRAIN, [], {"bucket": "s3://A"}, "bucket"),
    (TRAIN, [], {"queue": {}}, "queue.name"),
    (TRAIN, [], {"queue": {"name": "a", "elastik": True}}, "elastic"),
    (TRAIN, [], {"queue": {"name": "a", "priority_class": "A"}}, "priority_class"),
    (TRAIN, [], {"node_groups": {}}, "node_groups.head"),
    (TRAIN, [], {"node_groups": {"head": SMALL}}, "give cpu or gpu"),
    (TRAIN, [], {"node_groups": {"head": SMALL | {"spot": True}, "cpu": SMALL}}, "its head"),
    (TRAIN, [], {"node_groups": {"head": SMALL, "cpu": SMALL | {"cpus": 0}}}, "cpus"),
    (TRAIN, [], {"node_groups": {"head": SMALL, "cpu": SMALL | {"memory_gib": -1}}}, "memory_gib"),
    (TRAIN, [], {"node_groups": {"head": SMALL, "cpu": GPU}}, "gpus must be 0"),
    (TRAIN, [], {"node_groups": {"head": SMALL, "gpu": SMALL}}, "gpus must be 1"),
    (TRAIN, [], {"node_groups": {"head": SMALL, "tpu": SMALL}}, "did you mean"),
    (TRAIN, [], {"mlflow": {"uri": "sqlite:///mlflow.db"}}, "mlflow.uri"),
    (TRAIN, [], {"mlflow": {"uri": "https://a:b@mlflow"}}, "password"),
    (TRAIN, [], {"limits": {"hours": 0}}, "limits.hours"),
    (TRAIN, [], {"limits": {"retries": -1}}, "limits.retries"),
    (TRAIN, [], {"environment": {"API_TOKEN": "x"}}, "Secret"),
    (TRAIN, [], {"environment": {"A": "b"}, "secrets": {"A": {"secret": "s", "key": "k"}}}, "both"),
    (TRAIN, [], {"secrets": {"A": "literal"}}, "secrets.A"),
    (TRAIN, [], {"prices": {"currency": "USD"}}, "cpu_hour"),
    (TRAIN, ["workers.cpus=99"], {}, "99 CPUs"),
    (TRAIN, ["workers.gpu=true"], {"node_groups": {"head": SMALL, "cpu": SMALL}}, "no node group gpu"),
    (TRAIN, ["workers.count=999", "optimisation.batch_size=999"], {}, "max_pods"),
    (TRAIN, ["workers.cout=2"], {}, "count"),
    (TRAIN, ["features.cache=https://me:hidden@host/cache"], {}, "holds a secret"),
    (PREPROCESS, ["pipeline.encode_gpus=3", "pipeline.encode_actors=1"], {}, "3 GPUs"),
    (TUNE, ["preprocess=no-such-file.yaml"], {}, "no-such-file.yaml"),
    (TUNE, ["preprocess={job: train}"], {}, "preprocess"),
    (TUNE, ["train.workers.count=999", "train.optimisation.batch_size=999"], {}, "does not fit"),
]  # fmt: skip


def profile(folder: Path, changes: dict[str, Any]) -> str:
    values = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text()) | changes
    (folder / "here.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "here.yaml")


def test_there_are_60_right_and_40_wrong_ones() -> None:
    assert len(SPECS) * len(PROFILES) >= 60
    assert len(WRONG) >= 40


@pytest.mark.parametrize(("spec", "changes"), list(itertools.product(SPECS, PROFILES)))
def test_what_is_right_is_accepted(
    spec: str, changes: dict[str, Any], tmp_path: Path, shared_dir: Path
) -> None:
    job = manifest_of(f"jobs/specs/{spec}.yaml", [], profile(tmp_path, changes))
    assert errors(shared_dir / "kuberay" / "rayjobs.yaml", job) == []
    assert objections(job) == []
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert violations(group["template"]["spec"]) == []


@pytest.mark.parametrize(("spec", "sets", "changes", "said"), WRONG)
def test_what_is_wrong_is_refused_with_its_place(
    spec: str, sets: list[str], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises((SpecError, ProfileError)) as raised:
        manifest_of(f"jobs/specs/{spec}.yaml", sets, profile(tmp_path, changes))
    assert said in str(raised.value)
    assert "hidden" not in str(raised.value)


def test_what_a_sweep_runs_first_goes_with_it(tmp_path: Path) -> None:
    job = manifest_of(f"jobs/specs/{TUNE}.yaml", [], profile(tmp_path, {}))
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    sent = next(v["value"] for v in head["env"] if v["name"] == "CRAB_SPEC")
    spec = parse_spec(yaml.safe_load(sent))
    assert isinstance(spec, TuneSpec)
    assert isinstance(spec.preprocess, dict)
    first = parse_spec(spec.preprocess)
    assert first.name == "preprocess-shapes"
    assert first.tracking.uri == spec.tracking.uri == "https://mlflow.example.com"
