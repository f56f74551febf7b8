"""E11 of reference/reliability.md: what the roles of jobs and of MLflow may do, and that pods hold no keys."""

from __future__ import annotations

import json

import pytest
from support.iam import allows
from support.kustomize import K8S, of_kind, pod_templates

from jobs.submit import as_yaml, manifest_of

PROD = K8S / "overlays" / "prod"
BUCKET = "arn:aws:s3:::example-crab"
ONCE = {"s3:if-none-match": "*", "s3:ObjectCreationOperation": "true"}
OVER = {"s3:ObjectCreationOperation": "true"}
PART = {"s3:ObjectCreationOperation": "false"}
YES, NO = True, False
CASES = [
    ("job", "s3:ListBucket", BUCKET, {"s3:prefix": "features/commits/"}, YES),
    ("job", "s3:ListBucket", BUCKET, {"s3:prefix": "crab/jobs/a/"}, YES),
    ("job", "s3:ListBucket", BUCKET, {"s3:prefix": "mlflow/"}, NO),
    ("job", "s3:ListBucket", BUCKET, {}, NO),
    ("job", "s3:GetObject", f"{BUCKET}/features/packs/a", {}, YES),
    ("job", "s3:GetObject", f"{BUCKET}/mlflow/1/a", {}, NO),
    ("job", "s3:GetObject", "arn:aws:s3:::another/features/a", {}, NO),
    ("job", "s3:PutObject", f"{BUCKET}/features/packs/a", ONCE, YES),
    ("job", "s3:PutObject", f"{BUCKET}/features/packs/a", PART, YES),
    ("job", "s3:PutObject", f"{BUCKET}/features/packs/a", OVER, NO),
    ("job", "s3:PutObject", f"{BUCKET}/crab/jobs/a/0001/began.json", ONCE, YES),
    ("job", "s3:PutObject", f"{BUCKET}/crab/jobs/a/0001/began.json", OVER, NO),
    ("job", "s3:PutObject", f"{BUCKET}/mlflow/1/a", ONCE, NO),
    ("job", "s3:DeleteObject", f"{BUCKET}/features/leases/a/1.json", {}, YES),
    ("job", "s3:DeleteObject", f"{BUCKET}/features/packs/a", {}, NO),
    ("job", "s3:DeleteObject", f"{BUCKET}/features/commits/a", {}, NO),
    ("job", "s3:DeleteObject", f"{BUCKET}/crab/jobs/a/0001/began.json", {}, NO),
    ("job", "s3:DeleteBucket", BUCKET, {}, NO),
    ("job", "s3:PutBucketPolicy", BUCKET, {}, NO),
    ("mlflow", "s3:PutObject", f"{BUCKET}/mlflow/1/a", OVER, YES),
    ("mlflow", "s3:ListBucket", BUCKET, {"s3:prefix": "mlflow/1/"}, YES),
    ("mlflow", "s3:GetObject", f"{BUCKET}/mlflow/1/a", {}, YES),
    ("mlflow", "s3:DeleteObject", f"{BUCKET}/mlflow/1/a", {}, YES),
    ("mlflow", "s3:GetObject", f"{BUCKET}/features/packs/a", {}, NO),
    ("mlflow", "s3:PutObject", f"{BUCKET}/features/packs/a", ONCE, NO),
    ("mlflow", "s3:ListBucket", BUCKET, {"s3:prefix": "features/"}, NO),
]


@pytest.mark.parametrize(("role", "action", "resource", "context", "may"), CASES)
def test_what_a_role_may(
    role: str, action: str, resource: str, context: dict[str, str], may: bool
) -> None:
    policy = json.loads((PROD / f"{role}-policy.json").read_text())
    assert allows(policy, action, resource, context) is may


def test_the_policy_is_needed_statement_by_statement() -> None:
    """Teeth: without any one of its statements some case comes out otherwise."""
    for role in ("job", "mlflow"):
        policy = json.loads((PROD / f"{role}-policy.json").read_text())
        for index, statement in enumerate(policy["Statement"]):
            left = {"Statement": policy["Statement"][:index] + policy["Statement"][index + 1 :]}
            changed = [
                case
                for case in CASES
                if case[0] == role and allows(left, *case[1:4]) is not case[4]
            ]
            assert changed, statement["Sid"]


def test_pods_open_the_bucket_by_their_account_and_hold_no_keys() -> None:
    accounts = {a["metadata"]["name"]: a for a in of_kind("prod", "ServiceAccount")}
    for name in ("crab-job", "crab-mlflow"):
        assert accounts[name]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(
            name
        )
    job = manifest_of(
        "jobs/specs/train-shapes.yaml", [], str(K8S / "profiles" / "eks-example.yaml")
    )
    assert "serviceAccountName: crab-job" in as_yaml(job)
    assert "AWS_SECRET_ACCESS_KEY" not in as_yaml(job)
    for template in pod_templates("prod").values():
        for container in template["spec"]["containers"]:
            assert not [e for e in container.get("env", ()) if e["name"].startswith("AWS_")]
