"""Whether a policy of AWS lets a request through: Deny before Allow before nothing.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html. Of conditions StringLike,
Null and Bool; any other raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any


def allows(
    policy: Mapping[str, Any], action: str, resource: str, context: Mapping[str, str] | None = None
) -> bool:
    """`context`: condition keys of the request, such as s3:prefix."""
    effects = {
        statement["Effect"]
        for statement in policy["Statement"]
        if any(fnmatchcase(action, one) for one in _list(statement["Action"]))
        and any(fnmatchcase(resource, one) for one in _list(statement["Resource"]))
        and _holds(statement.get("Condition", {}), context or {})
    }
    return effects == {"Allow"}


def _holds(conditions: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    return all(
        _one(operator, context.get(key), wanted)
        for operator, keys in conditions.items()
        for key, wanted in keys.items()
    )


def _one(operator: str, value: str | None, wanted: Any) -> bool:
    if operator == "Null":
        return (value is None) == (wanted == "true")
    if operator == "StringLike":
        return value is not None and any(fnmatchcase(value, one) for one in _list(wanted))
    if operator == "Bool":
        return value == wanted
    raise NotImplementedError(operator)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
