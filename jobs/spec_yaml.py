"""A spec's file as plain values, with the changes that --set asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jobs.spec_errors import SpecError


def read_yaml(path: str | Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file after `changes` ("a.b=value" each; the value is read as YAML). Raises SpecError.

    `env:NAME` is read from the variable NAME, in which a job on a cluster gets its spec.
    """
    try:
        text = _text(str(path))
    except OSError as error:
        known = sorted(p.name for p in (Path(__file__).parent / "specs").glob("*.yaml"))
        raise SpecError(
            f"cannot read the spec {path}: {error.strerror}; expected a YAML file of a job. Shipped in jobs/specs/: "
            f"{', '.join(known)}"
        ) from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(
            f"{path}: expected a mapping with `job:` and `name:`, got {type(values).__name__}"
        )
    for change in changes:
        _apply(values, change)
    return values


def _text(path: str) -> str:
    if not path.startswith("env:"):
        return Path(path).read_text(encoding="utf-8")
    name = path.removeprefix("env:")
    if name not in os.environ:
        raise SpecError(f"{path}: the variable {name} is not set")
    return os.environ[name]


def _apply(values: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise SpecError(
            f"--set {change!r}: expected a.b=value, for example --set optimisation.steps=100"
        )
    put(values, path, yaml.safe_load(text), f"--set {change!r}")


def put(values: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Puts `value` at the dotted `path` of `values`, in place; mappings on the way that are absent are made.

    Raises SpecError, which begins with `where`, if something on the way is no mapping, or a list without such an item.
    """
    *parents, last = path.split(".")
    below: Any = values
    for name in parents:
        below = _inside(below, name, where)
    if not isinstance(below, dict):
        raise SpecError(f"{where}: {parents[-1]} is {below!r}, not a mapping")
    below[last] = value


def _inside(values: Any, name: str, where: str) -> Any:
    """The value under `name`; in a list, the item at that place or of that name (steps.train-nine.optimisation)."""
    if isinstance(values, dict):
        return values.setdefault(name, {})
    if not isinstance(values, list):
        raise SpecError(f"{where}: there is no {name} in {values!r}, it is not a mapping")
    names = [item.get("name") if isinstance(item, dict) else None for item in values]
    if name in names:
        return values[names.index(name)]
    if name.isdigit() and int(name) < len(values):
        return values[int(name)]
    known = ", ".join(str(known) for known in names if known)
    raise SpecError(f"{where}: no {name} in the list; it holds {known or len(values)}")
