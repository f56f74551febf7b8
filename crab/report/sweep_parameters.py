"""The dimensions of a sweep's space, each with its axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crab.report.scales import Choices, Scale, number, range_over, word
from crab.report.texts import clean


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One dimension of the space and its axis."""

    name: str
    key: str
    """As configurations name it; `name` is what a page can show."""
    kind: str
    """int, float or choice."""
    numeric: bool
    """Also where it is a choice between numbers."""
    scale: Scale
    log: bool
    searched: bool
    """Whether it is of the space: configurations may set more beside it, which the figures leave out."""

    @property
    def title(self) -> str:
        """Of its axis."""
        kind = {"int": "whole number", "float": "number"}.get(self.kind, "choice")
        return f"{self.name} ({kind}{', log scale' if self.log else ''})"

    def share(self, config: Mapping[str, Any]) -> float | None:
        """Where a configuration lies; None where it lacks the parameter, which null is not."""
        return self.scale.share(config[self.key]) if self.key in config else None


def read_parameters(
    space: Mapping[str, Any], configs: Sequence[Mapping[str, Any]]
) -> tuple[Parameter, ...]:
    """Those of the space, then what configurations set beside it."""
    names = dict.fromkeys([*space, *(key for config in configs for key in config)])
    return tuple(
        _parameter(
            key,
            space.get(key) or {},
            [config[key] for config in configs if key in config],
            searched=key in space or not space,
        )
        for key in names
    )


def _parameter(key: str, raw: Mapping[str, Any], seen: Sequence[Any], searched: bool) -> Parameter:
    """Its axis covers the space and whatever was tried: a baseline may lie outside."""
    kind = raw.get("kind")
    if kind not in ("int", "float", "choice"):
        kind = "float" if seen and all(number(value) is not None for value in seen) else "choice"
    scale: Scale
    if kind == "choice":
        values = [*(raw.get("choices") or ()), *seen]
        numeric = bool(values) and all(number(value) is not None for value in values)
        values = sorted(values) if numeric else values
        scale = Choices(names=tuple(dict.fromkeys(word(value) for value in values)))
        log = False
    else:
        found = [number(value) for value in (raw.get("low"), raw.get("high"), *seen)]
        scale = range_over(
            [value for value in found if value is not None], bool(raw.get("log")), kind == "int"
        )
        numeric, log = True, scale.log
    return Parameter(
        name=clean(str(key)),
        key=key,
        kind=kind,
        numeric=numeric,
        scale=scale,
        log=log,
        searched=searched,
    )
