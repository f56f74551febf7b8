"""KubeRay's own schemas, as an API server applies them with fieldValidation=Strict."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator


def strict(schema: Any) -> Any:
    """The schema of a CRD with unknown fields refused; `nullable` and int-or-string as JSON Schema says them."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for name, value in schema.items():
        if name == "properties":
            found[name] = {key: strict(inner) for key, inner in value.items()}
        elif name == "default":
            continue
        else:
            found[name] = strict(value)
    if (
        found.get("type") == "object"
        and "properties" in found
        and not found.get("x-kubernetes-preserve-unknown-fields")
    ):
        found.setdefault("additionalProperties", False)
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
    if found.pop("nullable", False):
        found["type"] = [found["type"], "null"]
    return found


@cache
def validator(file: Path) -> Draft202012Validator:
    """Of `ray.io/v1`, from a CRD."""
    definition = yaml.load(file.read_text(), yaml.CSafeLoader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return Draft202012Validator(schema)


def errors(file: Path, body: Any) -> list[str]:
    """What the API server would refuse, each with its place."""
    return [f"{error.json_path}: {error.message}" for error in validator(file).iter_errors(body)]
