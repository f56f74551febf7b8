"""Every field of a record, of a dataclass and of a pydantic model: found by walking, so that none can be forgotten."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

Path = tuple[str, ...]


def leaves(record: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    """Paths of all values of a record that are not records themselves. A list is one value."""
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name)


def value_at(record: Mapping[str, Any], path: Path) -> Any:
    found: Any = record
    for name in path:
        found = found[name]
    return found


def with_value(record: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of the record with one value replaced, or added."""
    changed = copy.deepcopy(dict(record))
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    holder[path[-1]] = value
    return changed


def without(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A copy of the record that lacks one value."""
    changed = copy.deepcopy(dict(record))
    holder = changed
    for name in path[:-1]:
        holder = holder[name]
    del holder[path[-1]]
    return changed


def another(value: Any) -> Any:
    """Some other value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 + 0.125
    if isinstance(value, str):
        return f"{value}+"
    if isinstance(value, list | tuple):
        return [*value[:-1], another(value[-1])] if value else ["+"]
    raise TypeError(f"{value!r} is a {type(value).__name__}; give its other value by hand")


def model_fields(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted names of all fields of a model, those of the models in it included.

    `data[].name` is a field of each item of a list; an optional model is walked as if it were there.
    """
    for name, field in model.model_fields.items():
        inner, mark = _model_in(field.annotation)
        if inner is None:
            yield above + name
        else:
            yield from model_fields(inner, f"{above}{name}{mark}.")


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model that a field holds, and "[]" where it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin = typing.get_origin(annotation)
    for argument in typing.get_args(annotation):
        inner, mark = _model_in(argument)
        if inner is not None:
            known = (list, typing.Union, types.UnionType, typing.Annotated)
            assert origin in known, f"do not know how to walk {annotation}"
            return inner, "[]" if origin is list else mark
    return None, ""
