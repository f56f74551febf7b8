"""What all parts of a spec share: no unknown keys, no changes, absolute paths."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def absolute(path: str) -> str:
    """A path as it is from anywhere; URLs stay as they are."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def absolute_sqlite(uri: str) -> str:
    """The same for sqlite:///path."""
    prefix = "sqlite:///"
    return prefix + absolute(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri


Place = Annotated[str, AfterValidator(absolute)]
"""A path or URL. Made absolute when the spec is read: workers stand in other folders."""
