"""Strict schemas of all that k8s/ has: Kubernetes' own from kubernetes-validate, those of operators by hand.

By hand are only the fields that we use, from the operators' API references: Kueue's v1beta2
(https://kueue.sigs.k8s.io/docs/reference/) and the Prometheus operator's
(https://prometheus-operator.dev/docs/api-reference/api/). So a field that is right but not listed here is refused too,
until somebody has looked it up.
"""

from __future__ import annotations

from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator

VERSION = "1.34"
_TEXT = {"type": "string", "minLength": 1}
_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITY = {"type": ["string", "integer"], "pattern": r"^[0-9.]+([KMGT]i?|m)?$"}


def _of(required: str, **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    names = required.split()
    return {
        "type": "object",
        "properties": properties,
        "required": names,
        "additionalProperties": False,
    }


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


_SELECTOR = _of(
    "",
    matchLabels=_MAP,
    matchExpressions=_list(
        _of(
            "key operator",
            key=_TEXT,
            operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]},
            values=_list(_TEXT),
        )
    ),
)
_TOLERATION = _of("", key=_TEXT, operator={"enum": ["Exists", "Equal"]}, value=_TEXT, effect=_TEXT)
_FLAVOR = _of(
    "name resources",
    name=_TEXT,
    resources=_list(_of("name nominalQuota", name=_TEXT, nominalQuota=_QUANTITY)),
)
_OPERATORS: dict[str, dict[str, Any]] = {
    "kueue.x-k8s.io/v1beta2 ResourceFlavor": {
        "spec": _of("", nodeLabels=_MAP, tolerations=_list(_TOLERATION))
    },
    "kueue.x-k8s.io/v1beta2 ClusterQueue": {
        "spec": _of(
            "namespaceSelector resourceGroups",
            namespaceSelector=_SELECTOR,
            queueingStrategy={"enum": ["BestEffortFIFO", "StrictFIFO"]},
            preemption=_of(
                "",
                withinClusterQueue={
                    "enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]
                },
            ),
            resourceGroups=_list(
                _of(
                    "coveredResources flavors",
                    coveredResources=_list(_TEXT),
                    flavors=_list(_FLAVOR),
                )
            ),
        )
    },
    "kueue.x-k8s.io/v1beta2 LocalQueue": {"spec": _of("clusterQueue", clusterQueue=_TEXT)},
    "kueue.x-k8s.io/v1beta2 WorkloadPriorityClass": {
        "value": {"type": "integer"},
        "description": _TEXT,
    },
    "monitoring.coreos.com/v1 PodMonitor": {
        "spec": _of(
            "selector podMetricsEndpoints",
            selector=_SELECTOR,
            podTargetLabels=_list(_TEXT),
            podMetricsEndpoints=_list(_of("port", port=_TEXT, path=_TEXT, interval=_TEXT)),
        )
    },
    "monitoring.coreos.com/v1 PrometheusRule": {
        "spec": _of(
            "groups",
            groups=_list(
                _of(
                    "name rules",
                    name=_TEXT,
                    rules=_list(
                        _of(
                            "alert expr labels annotations",
                            alert=_TEXT,
                            expr=_TEXT,
                            labels=_MAP,
                            annotations=_MAP,
                            **{"for": {"type": "string", "pattern": "^[0-9]+[smhd]$"}},
                        )
                    ),
                )
            ),
        )
    },
}


def errors(body: dict[str, Any]) -> list[str]:
    """What is wrong with an object, unknown fields among it."""
    known = _OPERATORS.get(f"{body['apiVersion']} {body['kind']}")
    if known is not None:
        schema = _of(
            " ".join(("apiVersion kind metadata", *known)),
            apiVersion=_TEXT,
            kind=_TEXT,
            metadata=_of("name", name=_TEXT, namespace=_TEXT, labels=_MAP, annotations=_MAP),
            **known,
        )
        found = Draft202012Validator(schema).iter_errors(body)
        return [f"{error.json_path}: {error.message}" for error in found]
    try:
        kubernetes_validate.validate(body, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"there is no schema for {body['apiVersion']} {body['kind']}"]
    return []
