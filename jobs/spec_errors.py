"""What is wrong with a spec, in words: where it stands, what was expected, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

NAME = r"^[a-z0-9][a-z0-9._-]*$"
"""Of jobs and data sets: a name is a folder, a part of URLs and of objects of Kubernetes."""


class SpecError(ValueError):
    """The spec is wrong; the message says where, what was expected and what to do. Exit code 2."""


def explain(
    error: ValidationError,
    values: Mapping[str, Any],
    where: str,
    kinds: Mapping[str, type[BaseModel]],
    root: type[BaseModel] | None = None,
) -> str:
    """The message for `values` that are no spec; `kinds` are the models by what stands under `job:`.

    root: the model of `values`, where that is always the same.
    """
    lines = [f"{where}: {error.error_count()} problem(s)"]
    for problem in error.errors():
        location, model = _place(problem["loc"], values, kinds, root)
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            names = sorted(model.model_fields) if model else []
            near = difflib.get_close_matches(location[-1], names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
            message = f"unknown key; {hint}"
        elif problem["type"] == "string_pattern_mismatch":
            message = f"is {problem['input']!r}; {_fits(problem['ctx']['pattern'])}"
        elif problem["type"] == "union_tag_invalid":
            known = problem["ctx"]["expected_tags"].replace("'", "")
            location = [*location, "job"]
            message = f"is {problem['ctx']['tag']!r}; expected one of {known}"
        elif problem["type"] == "union_tag_not_found":
            location, message = (
                [*location, "job"],
                f"is missing; expected one of {', '.join(kinds)}",
            )
        lines.append(f"  {'.'.join(location) or 'spec'}: {message}")
    return "\n".join(lines)


def _fits(pattern: str) -> str:
    if pattern == NAME:
        return "names are of a-z, 0-9, '.', '_' and '-', and begin with a letter or a digit"
    return f"expected something like {pattern}"


def _place(
    location: Sequence[str | int],
    values: Any,
    kinds: Mapping[str, type[BaseModel]],
    root: type[BaseModel] | None,
) -> tuple[list[str], type[BaseModel] | None]:
    """(the location as a person writes it, the model in which its last part stands).

    Pydantic puts the kind of a job into the location; a person names the step of a sequence instead of counting it.
    """
    shown: list[str] = []
    model: type[BaseModel] | None = None
    below = root
    for part in location:
        if isinstance(values, Mapping) and part == values.get("job") and part in kinds:
            below = kinds[str(part)]
            continue
        model = below
        field = model.model_fields.get(str(part)) if model else None
        if field is not None:
            below = next(iter(_models_in(field.annotation)), None)
        values = _item(values, part)
        name = values.get("name") if isinstance(part, int) and isinstance(values, Mapping) else None
        shown.append(str(name or part))
    return shown, model


def _item(values: Any, part: str | int) -> Any:
    if isinstance(values, Mapping):
        return values.get(part)
    if isinstance(values, list) and isinstance(part, int):
        return values[part]
    return None


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
