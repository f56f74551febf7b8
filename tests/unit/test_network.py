"""E8 of reference/reliability.md: who may talk to whom, in a table."""

from __future__ import annotations

import copy

import pytest
from support.kustomize import OVERLAYS, of_kind
from support.network import End, allows

HEAD = End({"crab/job": "train-1", "ray.io/node-type": "head"})
WORKER = End({"crab/job": "train-1", "ray.io/node-type": "worker"})
OTHER_JOB = End({"crab/job": "tune-2", "ray.io/node-type": "head"})
MLFLOW = End({"app.kubernetes.io/name": "crab-mlflow"})
POSTGRES = End({"app.kubernetes.io/name": "crab-postgres"})
S3 = End({"app.kubernetes.io/name": "crab-s3"})
STRANGER = End({"app": "notebook"})
ELSEWHERE = End({"app": "shop"}, namespace="shop")
OPERATOR = End({"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay-system")
FALSE_OPERATOR = End({"app.kubernetes.io/name": "kuberay-operator"}, namespace="shop")
PROMETHEUS = End({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
INGRESS = End({"app.kubernetes.io/name": "ingress-nginx"}, namespace="ingress")
DNS = End({"k8s-app": "kube-dns"}, namespace="kube-system")
KUBELET_METADATA = End(address="169.254.169.254")
BUCKET = End(address="52.216.1.2")
API_SERVER = End(address="10.0.0.1")
YES, NO = True, False
TABLE = [
    (WORKER, HEAD, 6379, YES),
    (HEAD, WORKER, 35127, YES),
    (WORKER, WORKER, 29500, YES),
    (WORKER, DNS, 53, YES),
    (MLFLOW, DNS, 53, YES),
    (POSTGRES, DNS, 53, YES),
    (WORKER, MLFLOW, 5000, YES),
    (HEAD, MLFLOW, 5000, YES),
    (MLFLOW, POSTGRES, 5432, YES),
    (WORKER, BUCKET, 443, YES),
    (MLFLOW, BUCKET, 443, YES),
    (HEAD, API_SERVER, 443, YES),
    (HEAD, API_SERVER, 6443, YES),
    (OPERATOR, HEAD, 8265, YES),
    (PROMETHEUS, WORKER, 8080, YES),
    (INGRESS, MLFLOW, 5000, YES),
    (OPERATOR, HEAD, 6379, NO),
    (OPERATOR, HEAD, 10001, NO),
    (FALSE_OPERATOR, HEAD, 8265, NO),
    (PROMETHEUS, HEAD, 8265, NO),
    (ELSEWHERE, HEAD, 8265, NO),
    (ELSEWHERE, HEAD, 10001, NO),
    (ELSEWHERE, MLFLOW, 5000, NO),
    (ELSEWHERE, POSTGRES, 5432, NO),
    (STRANGER, HEAD, 8265, NO),
    (STRANGER, MLFLOW, 5000, NO),
    (STRANGER, BUCKET, 443, NO),
    (ELSEWHERE, STRANGER, 8888, NO),
    (INGRESS, HEAD, 8265, NO),
    (INGRESS, POSTGRES, 5432, NO),
    (WORKER, POSTGRES, 5432, NO),
    (WORKER, ELSEWHERE, 443, NO),
    (WORKER, BUCKET, 22, NO),
    (WORKER, BUCKET, 80, NO),
    (WORKER, KUBELET_METADATA, 80, NO),
    (WORKER, KUBELET_METADATA, 443, NO),
    (MLFLOW, KUBELET_METADATA, 443, NO),
    (MLFLOW, HEAD, 8265, NO),
    (POSTGRES, BUCKET, 443, NO),
    (POSTGRES, WORKER, 5000, NO),
    (MLFLOW, API_SERVER, 6443, NO),
]
OF_KIND = [
    (WORKER, S3, 8333, YES),
    (HEAD, S3, 8333, YES),
    (MLFLOW, S3, 8333, YES),
    (POSTGRES, S3, 8333, NO),
    (ELSEWHERE, S3, 8333, NO),
    (S3, BUCKET, 443, NO),
    (S3, POSTGRES, 5432, NO),
]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_who_may_talk_to_whom(overlay: str) -> None:
    policies = of_kind(overlay, "NetworkPolicy")
    table = TABLE + (OF_KIND if overlay == "kind" else [])
    wrong = [row for row in table if allows(policies, *row[:3]) is not row[3]]
    assert wrong == []
    assert allows(policies, WORKER, DNS, 53, "UDP")
    # One token a namespace: policies cannot tell jobs apart, and do not pretend to.
    assert allows(policies, OTHER_JOB, HEAD, 6379)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_policy_that_is_missing_is_found(overlay: str) -> None:
    """Teeth: each policy, taken away, changes the table; and so does one that lets everybody in."""
    policies = of_kind(overlay, "NetworkPolicy")
    table = TABLE + (OF_KIND if overlay == "kind" else [])
    for index, policy in enumerate(policies):
        left = policies[:index] + policies[index + 1 :]
        changed = [row for row in table if allows(left, *row[:3]) is not row[3]]
        assert changed, policy["metadata"]["name"]
    wide = copy.deepcopy(policies)
    for policy in wide:
        if policy["metadata"]["name"] == "ray":
            policy["spec"]["ingress"].append({})
    assert [row for row in table if allows(wide, *row[:3]) is not row[3]]
