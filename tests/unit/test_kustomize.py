"""k8s/: every overlay renders, fits its schemas, is *restricted*, holds no secret, and has what profiles name."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kube_schemas import errors
from support.kustomize import K8S, OVERLAYS, Object, of_kind, pod_templates, rendered
from support.pod_security import violations

from crab_platform.cluster_profile import load_cluster, looks_secret

PROFILES = {"kind": "kind", "prod": "eks-example"}
"""Overlay -> the profile that is made for it."""


def test_there_is_a_profile_for_each_overlay() -> None:
    assert sorted(PROFILES) == OVERLAYS == ["kind", "prod"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_its_schema(overlay: str) -> None:
    found = {
        (body["kind"], body["metadata"]["name"]): wrong
        for body in rendered(overlay)
        if (wrong := errors(body))
    }
    assert found == {}


def plant(body: Object) -> Iterator[tuple[str, Object]]:
    """One mistake at a time: a field that nobody knows, in each object of the tree; a value of a wrong type."""
    for path, value in tree(body):
        if path and path[-1] in {"matchLabels", "labels", "annotations", "nodeLabels", "data"}:
            continue
        if {"labels", "annotations", "data", "matchLabels"} & set(path[:-1]):
            continue
        if isinstance(value, dict) and {"cpu", "memory", "storage"} & set(value):
            continue
        if isinstance(value, dict) and path[-1:] != ("emptyDir",):
            changed = copy.deepcopy(body)
            at(changed, path)["spek"] = 1
            yield ".".join(map(str, (*path, "spek"))), changed


def tree(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    yield path, value
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, inner in items:
        yield from tree(inner, (*path, name))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_field_that_nobody_knows_is_found_wherever_it_is(overlay: str) -> None:
    """Teeth of the schemas."""
    planted = [(body["kind"], *each) for body in rendered(overlay) for each in plant(body)]
    assert len(planted) > 200
    assert [(kind, where) for kind, where, changed in planted if not errors(changed)] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted_and_limited(overlay: str) -> None:
    for name, template in pod_templates(overlay).items():
        spec = template["spec"]
        assert violations(spec) == [], name
        assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
            assert container["readinessProbe"]
            assert container["livenessProbe"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_refuses_pods_that_are_not_restricted(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for body in rendered(overlay):
        if body["kind"] not in {
            "Namespace",
            "ResourceFlavor",
            "ClusterQueue",
            "WorkloadPriorityClass",
        }:
            assert body["metadata"]["namespace"] == namespace["metadata"]["name"], body["kind"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_named_never_written(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    for body in rendered(overlay):
        for path, value in tree(body):
            assert not looks_secret("", str(value)) or isinstance(value, dict | list), path
        for path, value in tree(body):
            # Of a file the path may stand here.
            if path[-2:-1] == ("env",) and not value.get("value", "/").startswith("/"):
                assert not looks_secret(value["name"], value["value"]), path


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_named_is_there(overlay: str) -> None:
    """Secrets by secrets.sh, all others by the overlay: of profiles, and of the overlay's own pods."""
    made = yaml.safe_load_all(
        subprocess.run(
            [str(K8S / "secrets.sh"), overlay], check=True, capture_output=True, text=True
        ).stdout
    )
    keys = {secret["metadata"]["name"]: set(secret["stringData"]) for secret in made}
    _, profile, _ = load_cluster(str(K8S / "profiles" / f"{PROFILES[overlay]}.yaml"))
    assert profile.namespace == "crab"
    assert profile.service_account in names(overlay, "ServiceAccount")
    assert profile.workspace in names(overlay, "PersistentVolumeClaim")
    assert profile.queue is not None
    assert profile.queue.name in names(overlay, "LocalQueue")
    assert profile.queue.priority_class in names(overlay, "WorkloadPriorityClass")
    assert "auth_token" in keys[profile.auth_secret]
    references = [*profile.secrets.values(), profile.mlflow.user, profile.mlflow.password]
    for reference in references:
        assert reference is not None
        assert reference.key in keys[reference.secret]
    for template in pod_templates(overlay).values():
        for path, value in tree(template):
            if path[-1:] == ("secretKeyRef",):
                assert value["key"] in keys[value["name"]]
            if path[-1:] == ("secret",):
                assert {item["key"] for item in value["items"]} <= keys[value["secretName"]]
        if (account := template["spec"].get("serviceAccountName")) is not None:
            assert account in names(overlay, "ServiceAccount")


def names(overlay: str, kind: str) -> set[str]:
    return {body["metadata"]["name"] for body in of_kind(overlay, kind)}


def test_secrets_are_drawn_anew_each_time() -> None:
    one, two = (
        subprocess.run([str(K8S / "secrets.sh"), "kind"], check=True, capture_output=True).stdout
        for _ in range(2)
    )
    drawn = [set(re.findall(rb"[0-9a-f]{64}", text)) for text in (one, two)]
    assert len(drawn[0]) == len(drawn[1]) == 6
    assert drawn[0].isdisjoint(drawn[1])
    assert subprocess.run([str(K8S / "secrets.sh")], capture_output=True).returncode == 2


def test_images_of_prod_are_by_digest() -> None:
    images = {
        container["image"]
        for template in pod_templates("prod").values()
        for container in template["spec"]["containers"]
    }
    assert len(images) == 2
    assert all(re.fullmatch(r"[\w./-]+@sha256:[0-9a-f]{64}", image) for image in images)


def test_the_dashboard_and_the_rules_ask_for_metrics_that_there_are() -> None:
    """Ray's by its own code, ours by the names that jobs log, KubeRay's and Kueue's by their docs."""
    (board,) = [b for b in of_kind("prod", "ConfigMap") if "crab.json" in b["data"]]
    panels = json.loads(board["data"]["crab.json"])["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    (rules,) = of_kind("prod", "PrometheusRule")
    asked += [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    used = {name for expr in asked for name in re.findall(r"\b(?:ray|kuberay|kueue)_\w+", expr)}
    operators = {"kuberay_job_deployment_status", "kueue_pending_workloads"}
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    of_ray = {f"ray_{name}" for name in METRICS_GAUGES}
    assert used - operators - {"ray_crab_metric"} <= of_ray
    ours = {name for expr in asked for name in re.findall(r'metric="([^"]+)"', expr)}
    written = "".join(
        path.read_text()
        for folder in ("platform", "crab", "jobs")
        for path in (K8S.parent / folder).rglob("*.py")
    )
    # val/loss is `val/` before what the recipe names.
    assert [name for name in ours - {"val/loss"} if f'"{name}"' not in written] == []


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(K8S / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (lambda text: text.replace("--no-install-recommends ", ""), "DL3015"),
        (lambda text: text + "USER root\n", "DL3002"),
        (lambda text: text.replace("WORKDIR /home/crab/job", "WORKDIR job"), "DL3000"),
    ],
)
def test_a_dockerfile_that_is_not_is_found(
    line: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    """Teeth of hadolint."""
    (tmp_path / "Dockerfile").write_text(line((K8S / "Dockerfile").read_text()))
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(hadolint), str(tmp_path / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert said in done.stdout


def test_the_image_has_all_that_runs_and_nothing_for_tests() -> None:
    text = (K8S / "Dockerfile").read_text()
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE))
    assert {"requirements", "crab", "jobs", "platform"} <= copied
    assert "tests" not in " ".join(copied)
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    ignored = (K8S.parent / ".dockerignore").read_text()
    for path in " ".join(copied).split():
        assert f"!{path.split('/')[0]}" in ignored, path
