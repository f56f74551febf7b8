"""Specs and profiles become RayJobs that KubeRay's schema and rules accept, in pods that are restricted."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.crd import errors
from support.pod_security import violations

from crab_platform.cluster_profile import ClusterProfile, load_cluster
from crab_platform.cost import SECTIONS, ProfileError
from crab_platform.rayjob import (
    MAX_NAME,
    SPEC_VARIABLE,
    GroupNeed,
    JobRequest,
    job_name,
    ray_job,
)
from crab_platform.rayjob_rules import objections
from jobs.placement import needs_of
from jobs.spec import SpecError, load_spec, parse_spec
from jobs.submit import as_yaml, manifest_of

GOLDEN = Path(__file__).parents[1] / "golden" / "rayjob"
SPECS = sorted(path.stem for path in Path("jobs/specs").glob("*.yaml"))
Change = Callable[[Any], object]


def profile(**changes: Any) -> ClusterProfile:
    _, found, _ = load_cluster("eks-example")
    return ClusterProfile.model_validate(found.model_dump() | changes)


def request(**changes: Any) -> JobRequest:
    values: dict[str, Any] = {
        "name": "train-shapes",
        "kind": "train",
        "spec": '{"job": "train"}',
        "needs": [GroupNeed(group="cpu", pods=4, scales=True), GroupNeed(group="gpu", pods=2)],
        "version": "1.2.3",
    }
    return JobRequest(**values | changes)


def queued() -> dict[str, Any]:
    return ray_job(request(), profile())


def unqueued() -> dict[str, Any]:
    return ray_job(request(code="code/0123.zip", commit="0123abcd+dirty"), profile(queue=None))


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.fixture(scope="session")
def schema(shared_dir: Path) -> Path:
    return shared_dir / "kuberay" / "rayjobs.yaml"


@pytest.mark.parametrize(("name", "make"), [("queued", queued), ("unqueued", unqueued)])
def test_the_object_is_the_one_in_the_golden_file(
    name: str, make: Callable[[], dict[str, Any]]
) -> None:
    """A change is looked at, and the file written anew: as_yaml(queued()) and as_yaml(unqueued())."""
    assert yaml.safe_load((GOLDEN / f"{name}.yaml").read_text()) == make()
    assert as_yaml(make()) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", SPECS)
def test_every_shipped_spec_becomes_an_object_that_is_accepted(name: str, schema: Path) -> None:
    job = manifest_of(f"jobs/specs/{name}.yaml", [], "eks-example")
    assert errors(schema, job) == []
    assert objections(job) == []
    spec = next(
        e["value"] for e in pods(job)[0]["containers"][0]["env"] if e["name"] == SPEC_VARIABLE
    )
    values = json.loads(spec)
    assert values["tracking"]["uri"] == "https://mlflow.example.com"
    parse_spec(values)
    for pod in pods(job):
        assert violations(pod) == []


def test_a_wrong_field_is_found_by_the_schema(schema: Path) -> None:
    """Teeth: the schema is strict at every depth, and knows types."""
    changes: list[Change] = [
        lambda job: job["spec"].update(shutdownAfterJobFinish=True),
        lambda job: job["spec"]["rayClusterSpec"].update(autoscaling=True),
        lambda job: pods(job)[0].update(restartpolicy="Never"),
        lambda job: pods(job)[1]["containers"][0].update(image=7),
        lambda job: pods(job)[1]["containers"][0]["env"].append({"name": "A", "valeu": "b"}),
        lambda job: job["spec"].update(backoffLimit="2"),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="Token"),
        lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
    ]
    for number, change in enumerate(changes):
        job = queued()
        change(job)
        assert errors(schema, job), number


counts = st.integers(1, 40)
cluster_profiles = st.builds(
    profile,
    queue=st.none() | st.fixed_dictionaries({"name": st.just("crab"), "elastic": st.booleans()}),
    limits=st.fixed_dictionaries(
        {
            "retries": st.integers(0, 5),
            "keep_minutes": st.integers(1, 100),
            "hours": counts,
            "start_minutes": counts,
        }
    ),
    environment=st.dictionaries(st.sampled_from(["A", "B"]), st.text("abc", max_size=5)),
)
requests = st.builds(
    request,
    name=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,80}", fullmatch=True),
    spec=st.text(max_size=50),
    needs=st.lists(
        st.builds(
            GroupNeed,
            group=st.sampled_from(["cpu", "gpu"]),
            pods=st.integers(1, 12),
            scales=st.booleans(),
        ),
        min_size=1,
        unique_by=lambda need: need.group,
    ),
    code=st.none() | st.just("code/b.zip"),
)


@given(requests, cluster_profiles)
def test_no_request_that_is_accepted_breaks_a_rule(
    schema: Path, asked: JobRequest, cluster: ClusterProfile
) -> None:
    try:
        job = ray_job(asked, cluster)
    except ProfileError:  # more pods than the profile allows
        assert any(need.pods > 8 and not need.scales for need in asked.needs)
        return
    assert objections(job) == []
    assert errors(schema, job) == []
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert len(job["metadata"]["name"]) <= MAX_NAME
    assert ray_job(asked, cluster) == job


def _cluster(job: Any) -> Any:
    return job["spec"]["rayClusterSpec"]


def _rules(job: Any) -> Any:
    return job["spec"]["deletionStrategy"]["deletionRules"]


BREAKS: list[tuple[str, Callable[[], Any], Change, str]] = [
    ("1 long", queued, lambda j: j["metadata"].update(name="a" * 48), "48 characters"),
    ("1 digit", queued, lambda j: j["metadata"].update(name="1a"), "begin with a letter"),
    (
        "2",
        queued,
        lambda j: (j["spec"].pop("shutdownAfterJobFinishes"), j["spec"].update(ttlSecondsAfterFinished=5)),
        "ttlSecondsAfterFinished: needs",
    ),
    ("3 shutdown", unqueued, lambda j: j["spec"].update(shutdownAfterJobFinishes=True), "excludes"),
    ("3 ttl", unqueued, lambda j: j["spec"].update(ttlSecondsAfterFinished=5), "excludes"),
    ("3 legacy", unqueued, lambda j: j["spec"]["deletionStrategy"].update(onSuccess={}), "deprecated"),
    ("3 workers", unqueued, lambda j: _rules(j)[0].update(policy="DeleteWorkers"), "autoscaling"),
    ("3 selector", unqueued, lambda j: j["spec"].update(clusterSelector={"a": "b"}), "another's"),
    ("3 order", unqueued, lambda j: _rules(j)[0]["condition"].update(ttlSeconds=9**9), "or more"),
    ("3 both", unqueued, lambda j: _rules(j)[0]["condition"].update(jobDeploymentStatus="Failed"), "not both"),
    ("4", queued, lambda j: j["spec"].pop("shutdownAfterJobFinishes"), "Kueue"),
    ("5 selector", queued, lambda j: j["spec"].update(clusterSelector={"a": "b"}), "Kueue does not"),
    (
        "5 groups",
        queued,
        lambda j: _cluster(j).update(
            workerGroupSpecs=[_cluster(j)["workerGroupSpecs"][0] | {"groupName": f"g{n}"} for n in range(18)]
        ),
        "18 groups",
    ),
    ("5 autoscaling", queued, lambda j: _cluster(j).update(enableInTreeAutoscaling=True), "elastic-job"),
    ("5 suspend", queued, lambda j: j["spec"].update(suspend=True), "Kueue sets it"),
    (
        "6",
        unqueued,
        lambda j: (j["spec"].pop("deletionStrategy"), j["spec"].update(suspend=True)),
        "suspend: needs",
    ),
    (
        "6 selector",
        unqueued,
        lambda j: j["spec"].update(suspend=True, clusterSelector={"a": "b"}),
        "suspend: excludes",
    ),
    ("7 mode", queued, lambda j: j["spec"].update(submissionMode="InteractiveMode"), "InteractiveMode"),
    ("7 selector", queued, lambda j: j["spec"].update(clusterSelector={"a": "b"}), "backoffLimit"),
    (
        "8",
        queued,
        lambda j: j["spec"].update(submissionMode="SidecarMode", submitterConfig={"backoffLimit": 1}),
        "submitterConfig: excludes",
    ),
    (
        "8 restart",
        queued,
        lambda j: (j["spec"].update(submissionMode="SidecarMode"), pods(j)[0].update(restartPolicy="Always")),
        "SidecarMode wants",
    ),
    ("9 restart", unqueued, lambda j: pods(j)[1].update(restartPolicy="Always"), "autoscaler v2"),
    ("9 absent", queued, lambda j: _cluster(j)["workerGroupSpecs"][0].pop("minReplicas"), "give both"),
    ("9 order", queued, lambda j: _cluster(j)["workerGroupSpecs"][0].update(minReplicas=99), "minReplicas 99"),
    ("9 negative", queued, lambda j: _cluster(j)["workerGroupSpecs"][0].update(minReplicas=-1), "minReplicas -1"),
    ("9 replicas", queued, lambda j: _cluster(j)["workerGroupSpecs"][0].update(replicas=99), "replicas: 99"),
    ("10", queued, lambda j: _cluster(j)["headGroupSpec"].update(resources={"cpu": "4"}), "num-cpus: excludes"),
    ("11 mode", queued, lambda j: _cluster(j).pop("authOptions"), "write token"),
    ("11 k8s", queued, lambda j: _cluster(j)["authOptions"].update(enableK8sTokenAuth=True), "not for RayJobs"),
    ("11 old", queued, lambda j: _cluster(j).update(rayVersion="2.51.1"), "2.52.0 or newer"),
    ("11 no version", queued, lambda j: _cluster(j).update(rayVersion="latest"), "2.52.0 or newer"),
    ("8 unknown", queued, lambda j: j["spec"].update(submissionMode="HttpMode"), "known are"),
    ("13", queued, lambda j: j["spec"].pop("submissionMode"), "K8sJobMode"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "change", "said"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS]
)
def test_every_rule_finds_what_breaks_it(
    make: Callable[[], Any], change: Change, said: str
) -> None:
    job = make()
    assert objections(job) == []
    change(job)
    found = objections(job)
    assert any(said in objection for objection in found), found
    assert all(objection.startswith(("spec", "metadata")) for objection in found), (
        "no field is named"
    )


def _container(pod: Any) -> Any:
    return pod["containers"][0]


MUTANTS: list[Change] = [
    lambda pod: _container(pod)["securityContext"].update(privileged=True),
    lambda pod: pod.update(hostNetwork=True),
    lambda pod: pod.update(hostPID=True),
    lambda pod: pod.update(hostIPC=True),
    lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    lambda pod: pod["volumes"].append({"name": "nfs", "nfs": {"server": "a", "path": "/"}}),
    lambda pod: _container(pod)["securityContext"].update(runAsNonRoot=False),
    lambda pod: _container(pod)["securityContext"].update(runAsUser=0),
    lambda pod: pod["securityContext"].update(runAsUser=0),
    lambda pod: _container(pod)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
    lambda pod: _container(pod)["securityContext"].update(allowPrivilegeEscalation=True),
    lambda pod: _container(pod)["securityContext"].pop("allowPrivilegeEscalation"),
    lambda pod: _container(pod)["securityContext"]["capabilities"].update(drop=["NET_RAW"]),
    lambda pod: _container(pod)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    lambda pod: _container(pod)["securityContext"].update(procMount="Unmasked"),
    lambda pod: _container(pod).setdefault("ports", []).append({"containerPort": 1, "hostPort": 1}),
]


def test_pods_are_restricted_and_what_is_not_is_found() -> None:
    """E2 of reference/reliability.md, for the pods of Ray: 16 of 16 planted violations."""
    for job in (queued(), unqueued()):
        for pod in pods(job):
            assert violations(pod) == []
            found = 0
            for mutant in MUTANTS:
                changed = copy.deepcopy(pod)
                mutant(changed)
                found += bool(violations(changed))
            assert found == len(MUTANTS) == 16


def test_the_same_submission_has_the_same_name_and_any_other_another() -> None:
    assert queued() == queued()
    names = {
        ray_job(asked, cluster)["metadata"]["name"]
        for asked, cluster in (
            (request(), profile()),
            (request(spec='{"job": "tune"}'), profile()),
            (request(code="code/b.zip"), profile()),
            (request(), profile(queue=None)),
            (request(), profile(image=f"other@sha256:{'1' * 64}")),
        )
    }
    assert len(names) == 5
    assert job_name("A_b.c--", "0123456789") == "a-b-c-01234567"
    assert job_name("9" * 60, "0123456789").startswith("crab-999")


def test_workers_go_at_once_whatever_the_end() -> None:
    assert queued()["spec"]["ttlSecondsAfterFinished"] == 0
    rules = _rules(ray_job(request(needs=[GroupNeed(group="gpu", pods=2)]), profile(queue=None)))
    first = {
        next(iter(rule["condition"].items()))
        for rule in rules
        if rule["policy"] == "DeleteWorkers" and rule["condition"]["ttlSeconds"] == 0
    }
    assert first == {
        ("jobStatus", "SUCCEEDED"),
        ("jobStatus", "FAILED"),
        ("jobDeploymentStatus", "Failed"),
    }


def test_only_preprocessing_scales_and_only_where_the_queue_can() -> None:
    elastic = profile(queue={"name": "crab", "elastic": True})
    for cluster, scales in ((profile(), False), (elastic, True), (profile(queue=None), True)):
        job = ray_job(request(), cluster)
        assert bool(_cluster(job).get("enableInTreeAutoscaling")) == scales
        assert pods(job)[0]["automountServiceAccountToken"] == scales
        assert not pods(job)[1]["automountServiceAccountToken"]
        low = {g["groupName"]: g["minReplicas"] for g in _cluster(job)["workerGroupSpecs"]}
        assert low == {"cpu": 0 if scales else 4, "gpu": 2}


def test_groups_are_as_large_as_the_work() -> None:
    cluster = profile()  # cpu: 8 CPUs a pod, at most 16; gpu: 8 CPUs and a GPU, at most 8

    def found(name: str, *changes: str, misses: int | None = None) -> dict[str, int]:
        spec = load_spec(f"jobs/specs/{name}.yaml", changes)
        return {need.group: need.pods for need in needs_of(spec, cluster, misses)}

    gpu = ("pipeline.encode_gpus=1", "pipeline.encode_actors=3")
    assert found("preprocess-shapes", *gpu, misses=10)["gpu"] == 3
    assert found("preprocess-shapes", *gpu, misses=0) == {"cpu": 1}, "a GPU with nothing to do"
    assert found("train-shapes", "workers.count=12", "optimisation.batch_size=24") == {"cpu": 2}
    assert found("train-shapes", "workers.gpu=true") == {"gpu": 2}
    assert found("tune-heads") == {"cpu": 3}, "24 trials of a CPU"
    assert found("tune-heads", "search.max_concurrent=4") == {"cpu": 1}
    assert found("evaluate-shapes", "device=cuda", "workers=4") == {"gpu": 4}
    assert found("nine-tasks-tiny").keys() == {"cpu"}
    with pytest.raises(SpecError, match="16 CPUs"):
        found("train-shapes", "workers.cpus=16")
    with pytest.raises(SpecError, match="no node group gpu"):
        needs_of(
            load_spec("jobs/specs/train-shapes.yaml", ["workers.gpu=true"]),
            profile(node_groups=cluster.node_groups.model_dump() | {"gpu": None}),
        )


SECRET = "s3cr3t-canary"


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {"DB_PASSWORD": SECRET}},
        {"environment": {"AWS_SECRET_ACCESS_KEY": SECRET}},
        {"environment": {"HF_TOKEN": SECRET}},
        {"environment": {"ENDPOINT": f"https://me:{SECRET}@host"}},
        {"environment": {"ID": "AKIA0123456789ABCDEF"}},
        {"mlflow": {"uri": f"https://me:{SECRET}@mlflow"}},
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    values = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text()) | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ProfileError) as raised:
        load_cluster(file)
    assert SECRET not in str(raised.value)
    assert "ecret" in str(raised.value)


def test_a_spec_that_is_none_is_refused_as_everywhere() -> None:
    with pytest.raises(SpecError, match="tracking"):
        manifest_of("jobs/specs/train-shapes.yaml", ["tracking=here"], "eks-example")


def test_a_secret_in_a_spec_is_refused() -> None:
    with pytest.raises(SpecError, match="holds a secret") as raised:
        manifest_of(
            "jobs/specs/train-shapes.yaml",
            [f"features.cache=https://me:{SECRET}@host/cache"],
            "eks-example",
        )
    assert SECRET not in str(raised.value)


SMALL: dict[str, Any] = {"cpus": 1, "memory_gib": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image": "crab:latest"}, "no image by digest"),
        ({"ray_version": "2.51.0"}, "2.52.0 or newer"),
        ({"namespace": "Crab"}, "namespace"),
        ({"bucket": "gs://crab"}, "bucket"),
        ({"queue": {"nam": "crab"}}, "did you mean 'name'"),
        ({"node_groups": {"head": SMALL}}, "give cpu or gpu"),
        ({"node_groups": {"head": SMALL | {"spot": True}, "cpu": SMALL}}, "not survive its head"),
        ({"node_groups": {"head": SMALL, "gpu": SMALL}}, "gpus must be 1"),
        ({"node_groups": {"head": SMALL, "cpu": SMALL | {"gpus": 1}}}, "gpus must be 0"),
        ({"limits": {"hours": 0}}, "limits.hours"),
        ({"environment": {"A": "b"}, "secrets": {"A": {"secret": "s", "key": "k"}}}, "both in"),
        ({"nodegroups": {}}, "did you mean 'node_groups'"),
    ],
)
def test_a_wrong_profile_says_where(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text()) | changes
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ProfileError, match=said):
        load_cluster(file)


def test_a_profile_without_a_cluster_says_so() -> None:
    with pytest.raises(ProfileError, match="describes no cluster"):
        load_cluster("laptop")


def test_the_sections_that_prices_know_of_are_those_of_a_cluster() -> None:
    assert set(SECTIONS) == {"prices", *ClusterProfile.model_fields}
