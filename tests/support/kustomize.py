"""The objects of an overlay of k8s/, as kubectl renders them."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
Object = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    """Everything that `kubectl apply -k` would send. Skips the test where there is no kubectl; CI has one."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # kustomize warns of what is deprecated
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [found for found in rendered(overlay) if found["kind"] == kind]


def pod_templates(overlay: str) -> dict[str, Object]:
    """Name -> template of everything that makes pods."""
    return {
        found["metadata"]["name"]: found["spec"]["template"]
        for found in rendered(overlay)
        if "template" in found.get("spec", {})
    }
