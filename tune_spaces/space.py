"""What a sweep varies: a space is named parameters, each with its range and its place in a train spec.

Ranges are Optuna's own distributions, so that whatever draws the values reads them without translation. A space knows
places by name alone; whether a train spec has such a place, and whether a sample of it can be trained at all, is
jobs/trial_spec.py's business.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

Distribution = IntDistribution | FloatDistribution | CategoricalDistribution


@dataclass(frozen=True)
class Parameter:
    """One value that a sweep varies.

    Raises:
        ValueError: `values` beside a range of numbers, or not for exactly the choices of `distribution`.
    """

    path: str
    """Where the value stands in a train spec, as `crab run --set` has it: optimisation.learning_rate."""
    distribution: Distribution
    meaning: str
    """For people: what it does, and what its ends mean."""
    values: Mapping[str, Any] | None = None
    """What each choice stands for in the spec, where that is more than its name: lists, for example."""

    def __post_init__(self) -> None:
        if self.values is None:
            return
        chosen = self.distribution
        choices = chosen.choices if isinstance(chosen, CategoricalDistribution) else None
        if choices is None or {*choices} != {*self.values}:
            raise ValueError(
                f"{self.path}: values are given for {', '.join(map(repr, self.values))}, while the choices are "
                f"{', '.join(map(repr, choices)) if choices else 'a range of numbers'}; give one value a choice"
            )


@dataclass(frozen=True)
class Space:
    """Parameters that are varied together.

    Raises:
        ValueError: two parameters for the same place of the spec, or `changes_shapes` that names no parameter.
    """

    name: str
    about: str
    """One sentence: which question a sweep over it answers."""
    parameters: Mapping[str, Parameter]
    changes_shapes: frozenset[str] = field(default_factory=frozenset)
    """Those that weights have their shapes from. They hold for a whole trial: population based training, which changes
    values between two steps, must leave them alone."""

    def __post_init__(self) -> None:
        if strange := sorted(self.changes_shapes - self.parameters.keys()):
            raise ValueError(
                f"space {self.name}: changes_shapes names {', '.join(strange)}, which is no parameter of it; it has "
                f"{', '.join(self.parameters)}"
            )
        for (one, outer), (other, inner) in permutations(self.parameters.items(), 2):
            if f"{inner.path}.".startswith(f"{outer.path}."):
                raise ValueError(
                    f"space {self.name}: {one} ({outer.path}) and {other} ({inner.path}) are put at the same place of "
                    "the spec; leave one of them out"
                )


def settings(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What one sample puts into a train spec: path -> value, as plain Python values.

    Args:
        config: parameter -> value as it was drawn. Of parameters that are not in it the spec keeps its own values.

    Raises:
        ValueError: a name that is no parameter of the space, or a value that is outside its range.
    """
    found = {}
    for name, value in config.items():
        parameter = space.parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"{name} = {value!r}: space {space.name} has no such parameter; "
                f"{_nearest(name, list(space.parameters))}"
            )
        found[parameter.path] = _value(name, parameter, value)
    return found


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """The ranges by parameter as plain values, for reports and records.

    {"kind": "int" or "float", "low", "high", "log"}, with "step" where values lie further apart than they must; or
    {"kind": "choice", "choices"}.
    """
    return {name: _range(parameter.distribution) for name, parameter in space.parameters.items()}


def load_space(names: Sequence[str]) -> Space:
    """One space, or several as one.

    Args:
        names: of files in this folder, without .py; or paths of your own files, which end in .py and define SPACE.
            Such a file is run.

    Raises:
        ValueError: no name, an unknown one, a file without a SPACE, or the same parameter in two of the spaces.
    """
    if not names:
        raise ValueError(f"name at least one space; there are {', '.join(_shipped())}")
    spaces = [_load(name) for name in names]
    parameters: dict[str, Parameter] = {}
    for space in spaces:
        if twice := sorted(parameters.keys() & space.parameters.keys()):
            raise ValueError(
                f"spaces {', '.join(names)}: {', '.join(twice)} of {space.name} is in a space before it as well; "
                "leave one of them out"
            )
        parameters |= space.parameters
    return Space(
        name="+".join(space.name for space in spaces),
        about=" ".join(space.about for space in spaces),
        parameters=parameters,
        changes_shapes=frozenset[str]().union(*(space.changes_shapes for space in spaces)),
    )


def _load(name: str) -> Space:
    if name.endswith(".py"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"space {name}: there is no such file in {Path.cwd()}")
        found = runpy.run_path(str(path)).get("SPACE")
    elif name in _shipped():
        found = importlib.import_module(f"tune_spaces.{name}").SPACE
    else:
        raise ValueError(f"there is no space {name!r}; {_nearest(name, _shipped())}, or a .py file")
    if not isinstance(found, Space):
        raise ValueError(
            f"space {name}: SPACE is {'absent' if found is None else repr(found)}; expected "
            "SPACE = Space(...) of tune_spaces.space, as in tune_spaces/adapter.py"
        )
    return found


def _shipped() -> list[str]:
    """Every file of this folder but this one is a space."""
    here = Path(__file__)
    return sorted(p.stem for p in here.parent.glob("[!_]*.py") if p.name != here.name)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}known are {', '.join(known)}"


def _value(name: str, parameter: Parameter, value: Any) -> Any:
    chosen = parameter.distribution
    if isinstance(chosen, CategoricalDistribution):
        # By type as well: True is 1 in Python, and no number in a spec.
        if not any(type(value) is type(choice) and value == choice for choice in chosen.choices):
            said = ", ".join(map(repr, chosen.choices))
            raise ValueError(f"{name} = {value!r} is outside its range: expected one of {said}")
        return value if parameter.values is None else copy.deepcopy(parameter.values[value])
    is_whole = isinstance(chosen, IntDistribution)
    is_number = isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)
    if not (is_number and _is_within(chosen, value)):
        kind = "a whole number" if is_whole else "a number"
        steps = f" in steps of {chosen.step}" if chosen.step not in (None, 1) else ""
        raise ValueError(
            f"{name} = {value!r} is outside its range: expected {kind} from {chosen.low} to {chosen.high}{steps}"
        )
    return int(value) if is_whole else float(value)


def _is_within(chosen: IntDistribution | FloatDistribution, value: float) -> bool:
    if not chosen.low <= value <= chosen.high:  # neither for NaN
        return False
    if chosen.step is None:
        return True
    steps = (value - chosen.low) / chosen.step
    return math.isclose(steps, round(steps), abs_tol=1e-8)  # 0.1 + 0.2 is a step of 0.1


def _range(chosen: Distribution) -> dict[str, Any]:
    if isinstance(chosen, CategoricalDistribution):
        return {"kind": "choice", "choices": list(chosen.choices)}
    kind = "int" if isinstance(chosen, IntDistribution) else "float"
    found = {"kind": kind, "low": chosen.low, "high": chosen.high, "log": chosen.log}
    return found if chosen.step in (None, 1) else found | {"step": chosen.step}
