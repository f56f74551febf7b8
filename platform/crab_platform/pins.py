"""Pins: manifests that a project keeps until it says otherwise.

    pins/<project>/<name>.json

A pin is a root of garbage collection, whoever runs it. It ends only with `unpin`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

from crab_platform.clock import SYSTEM, Clock
from crab_platform.storage import AlreadyExists, Store

PINS = "pins"
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One manifest that a project keeps."""

    project: str
    name: str
    manifest: str
    reason: str = ""
    by: str = ""
    at_ns: int = 0

    @property
    def path(self) -> str:
        """Where it lies in its store."""
        return pin_path(self.project, self.name)


def pin_path(project: str, name: str) -> str:
    """Raises ValueError for words that are no names."""
    for word in (project, name):
        if not _WORD.fullmatch(word):
            raise ValueError(f"{word!r} is no name for a pin; use letters, digits and ._-")
    return f"{PINS}/{project}/{name}.json"


def write_pin(store: Store, pin: Pin, *, clock: Clock = SYSTEM) -> Pin:
    """Writes a pin, or returns the one that is there. Raises ValueError when the project has another of that name."""
    if not pin.at_ns:
        pin = Pin(**{**asdict(pin), "at_ns": clock.time_ns()})
    try:
        store.create(pin.path, json.dumps(asdict(pin), sort_keys=True).encode())
    except AlreadyExists:
        there = _parse(store, pin.path)
        if there.manifest != pin.manifest:
            raise ValueError(
                f"project {pin.project!r} has a pin {pin.name!r} already, of manifest {there.manifest[:12]}; "
                "choose another name, or unpin that one first"
            ) from None
        return there
    return pin


def remove_pin(store: Store, project: str, name: str) -> Pin:
    """Ends a pin and returns it. Raises ValueError when there is none of that name."""
    path = pin_path(project, name)
    try:
        pin = _parse(store, path)
    except FileNotFoundError:
        known = [f"{found.project}/{found.name}" for found in read_pins(store)]
        raise ValueError(
            f"there is no pin {project}/{name} in {store.url}; there are: {', '.join(known) or 'none'}"
        ) from None
    store.delete(path)
    return pin


def read_pins(store: Store) -> list[Pin]:
    """Every pin of every project. Raises ValueError for a file that is none."""
    found = []
    for path in store.list(PINS):
        try:
            found.append(_parse(store, path))
        except FileNotFoundError:  # removed since it was listed
            continue
    return found


def _parse(store: Store, path: str) -> Pin:
    data = store.read(path)
    try:
        pin = Pin(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{store.url}/{path} is no pin ({error}); have somebody look at it, then delete it"
        ) from error
    return pin
