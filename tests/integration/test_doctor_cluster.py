"""`crab doctor --profile`: each part that is missing is named, and the others are looked at all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from servers.kube_api_server import KubeServer, kube_api_server
from servers.seaweedfs import S3Server
from support.kube import write_kubeconfig

from jobs.doctor import Check
from jobs.doctor_cluster import USED, check_cluster

GOOD = {"Kubernetes", "KubeRay", "rights", "queue", "a job", "Ray", "image", "bucket"}


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


@pytest.fixture
def check(
    server: KubeServer, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Check]]:
    """Runs all checks on a profile with some values changed."""
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(server, tmp_path / "kubeconfig")))

    def run(**changes: object) -> dict[str, Check]:
        profile = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text())
        profile |= {"bucket": s3.url(f"doctor-{tmp_path.name}"), **changes}
        (tmp_path / "here.yaml").write_text(yaml.safe_dump(profile))
        return {found.name: found for found in check_cluster(str(tmp_path / "here.yaml"), None)}

    return run


def failed(found: dict[str, Check]) -> set[str]:
    return {name for name, one in found.items() if not one.ok}


def test_a_cluster_that_can_take_a_job(
    check: Callable[..., dict[str, Check]], server: KubeServer
) -> None:
    found = check()
    assert failed(found) == {"MLflow"}, found  # there is none at the address of the example
    assert found.keys() == GOOD | {"MLflow"}
    assert "v1.34.1" in found["Kubernetes"].found
    assert server.all("rayjobs") == [], "the job was a dry run"


def test_what_is_missing_is_named_with_the_way_out(
    check: Callable[..., dict[str, Check]], server: KubeServer
) -> None:
    server.denied = {("create", "rayjobs"), ("list", "workloads")}
    rights = check()["rights"]
    assert not rights.ok
    assert "create rayjobs, list workloads" in rights.found
    assert "crab-submitter" in rights.found
    server.denied = set()

    del server.kinds["localqueues"], server.kinds["workloads"]
    assert "leave queue out" in check()["queue"].found
    assert "queue" not in check(queue=None)

    assert "ray_version" in check(ray_version="2.55.0")["Ray"].found
    assert "bucket" in failed(check(bucket="s3://no-such-bucket-here/x"))

    del server.kinds["rayjobs"]
    found = check()
    assert {"KubeRay", "a job"} <= failed(found)
    assert "install the operator" in found["KubeRay"].found


def test_an_operator_that_is_older_than_the_profile_is_found_by_the_dry_run(
    check: Callable[..., dict[str, Check]], server: KubeServer, shared_dir: Path, tmp_path: Path
) -> None:
    crd = yaml.safe_load((shared_dir / "kuberay" / "rayjobs.yaml").read_text())
    for version in crd["spec"]["versions"]:
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        spec["properties"].pop("preRunningDeadlineSeconds", None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rayjobs.yaml").write_text(yaml.safe_dump(crd))
    server.schemas = tmp_path / "old"
    found = check()["a job"]
    assert not found.ok
    assert "preRunningDeadlineSeconds" in found.found


def test_what_is_asked_for_is_what_the_client_uses(server: KubeServer) -> None:
    """The list of rights has no verb twice and no wildcard; k8s/base is compared with what the client sends."""
    pairs = [(group, resource, verb) for group, resource, verbs in USED for verb in verbs]
    assert len(set(pairs)) == len(pairs)
    assert "*" not in {part for pair in pairs for part in pair}
