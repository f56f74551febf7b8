"""What work, storage and requests cost at the prices of a profile, and whether a cache pays.

Prices stand in a profile's `prices:` section (`k8s/profiles/*.yaml`), one number a kind of thing,
without volume discounts: an estimate that is a little too high is the useful kind. A GB is 1e9
bytes. AWS counts 2**30 bytes as one, so for S3 these functions say 7 % too much.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crab_platform.cache import PACK_BYTES
from crab_platform.ranges import PIECE_BYTES

GB = 1e9

PROFILES = Path(__file__).resolve().parents[2] / "k8s" / "profiles"
"""The profiles of this checkout; any other is given by its path."""

SECTIONS = (
    *("prices", "namespace", "image", "image_pull_secret", "ray_version", "service_account"),
    *("auth_secret", "node_groups", "queue", "workspace", "bucket", "mlflow", "environment"),
    *("secrets", "limits"),
)
"""What a profile may hold. Only the prices are read here; the rest describes the cluster (cluster_profile.py)."""


class ProfileError(ValueError):
    """There is no such profile, or it is not one. The command line exits with 2."""


class Prices(BaseModel):
    """One number a kind of thing, in `currency`. None is negative."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    currency: str = Field(pattern=r"^[A-Z]{3}$")
    cpu_hour: float = Field(ge=0)
    """One core (a vCPU) for an hour."""
    gpu_hour: float = Field(ge=0)
    storage_gb_month: float = Field(ge=0)
    put_per_1000: float = Field(ge=0)
    get_per_1000: float = Field(ge=0)
    list_per_1000: float = Field(ge=0)
    egress_gb: float = Field(ge=0)
    """Bytes that leave the store's region."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where jobs run. `name` is that of its file."""

    name: str
    prices: Prices


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether keeping an encoder's features costs less than making them again, for one clip."""

    reuses: int | None
    """From so many reuses a month on the cache pays; None when it never does."""
    recompute: float
    """One more decode and encode."""
    keep: float
    """A month of storage, and the writing."""
    read: float
    """One read from the cache."""
    sentence: str
    """The same for a person."""


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile of that name in `k8s/profiles`, or in the file of that path.

    Raises ProfileError where it is absent, is not YAML, or holds a key or a price that is not
    known, with the nearest name that is.
    """
    path, _, prices = read_profile(name_or_path)
    return Profile(name=path.stem, prices=prices)


def read_profile(name_or_path: str | Path) -> tuple[Path, dict[str, Any], Prices]:
    """A profile's file, all that it holds, and its prices. Raises ProfileError as load_profile does."""
    path = _profile_path(str(name_or_path))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"cannot read the profile {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("prices"), dict):
        raise ProfileError(
            f"{path}: expected a mapping with a section `prices:`; see {PROFILES}/aws-example.yaml"
        )
    for key in values:
        if key not in SECTIONS:
            raise ProfileError(f"{path}: {key}: unknown key; {hint(str(key), SECTIONS)}")
    try:
        prices = Prices.model_validate(values["prices"])
    except ValidationError as error:
        raise ProfileError(f"{path}: {_explain(error)}") from error
    return path, values, prices


def compute_cost(cpu_s: float, gpu_s: float, prices: Prices) -> float:
    """Core-seconds and GPU-seconds."""
    _not_negative(cpu_s=cpu_s, gpu_s=gpu_s)
    return (cpu_s * prices.cpu_hour + gpu_s * prices.gpu_hour) / 3600


def store_cost(bytes_: float, months: float, puts: float, prices: Prices) -> float:
    """Write `puts` files of `bytes_` in all, and keep them for `months`."""
    _not_negative(bytes_=bytes_, months=months, puts=puts)
    return bytes_ / GB * months * prices.storage_gb_month + puts / 1000 * prices.put_per_1000


def read_cost(bytes_: float, gets: float, egress: bool, prices: Prices) -> float:
    """Read `bytes_` in `gets` requests; `egress` when they leave the store's region."""
    _not_negative(bytes_=bytes_, gets=gets)
    leaving = bytes_ / GB * prices.egress_gb if egress else 0.0
    return leaving + gets / 1000 * prices.get_per_1000


def list_cost(files: float, prices: Prices, *, page: int = 1000) -> float:
    """List `files` names; S3 gives 1,000 of them a request, and asks for one even when empty."""
    _not_negative(files=files)
    return max(1, math.ceil(files / page)) / 1000 * prices.list_per_1000


def cache_pays(
    *,
    bytes_: float,
    decode_cpu_s: float,
    encode_cpu_s: float = 0.0,
    encode_gpu_s: float = 0.0,
    prices: Prices,
    egress: bool = False,
    pack_bytes: int = PACK_BYTES,
) -> Verdict:
    """Compare one more decode and encode of a clip with keeping its `bytes_` for a month.

    A pack and its commit are two writes that the clips in it share. The first computation is paid
    either way and is left out; `reuses` counts every later time that a clip's features are wanted
    within a month: an epoch, a trial of a sweep, another team's run.
    """
    recompute = compute_cost(decode_cpu_s + encode_cpu_s, encode_gpu_s, prices)
    keep = store_cost(bytes_, 1, 2 * min(1.0, bytes_ / pack_bytes), prices)
    read = read_cost(bytes_, max(1, math.ceil(bytes_ / PIECE_BYTES)), egress, prices)
    saved = recompute - read
    reuses = max(1, math.ceil(keep / saved)) if saved > 0 else None
    again = money(recompute, prices.currency)
    if reuses is None:
        sentence = (
            f"caching never pays at these prices: reading a clip costs "
            f"{money(read, prices.currency)}, computing it again {again}; what it saves is time"
        )
    else:
        sentence = (
            f"caching pays from {reuses} {'reuse' if reuses == 1 else 'reuses'} a month on: "
            f"computing a clip again costs {again}, keeping its {bytes_ / 1e6:.3g} MB for a month "
            f"{money(keep, prices.currency)}, reading it {money(read, prices.currency)}"
        )
    return Verdict(reuses=reuses, recompute=recompute, keep=keep, read=read, sentence=sentence)


def money(amount: float, currency: str) -> str:
    """An amount with three significant digits, never as 1e-05; from 1,000 on in whole units."""
    if abs(amount) >= 1000:
        text = f"{amount:,.0f}"
    elif amount == 0:
        text = "0"
    else:
        text = f"{amount:.{max(2, 2 - math.floor(math.log10(abs(amount))))}f}"
    return f"{text} {currency}"


def _profile_path(text: str) -> Path:
    if "/" in text or text.endswith((".yaml", ".yml")):
        return Path(text).expanduser()
    path = PROFILES / f"{text}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PROFILES.glob("*.yaml"))
        raise ProfileError(
            f"there is no profile {text!r} in {PROFILES}; {hint(text, known)}, or give the path "
            "of a YAML file"
        )
    return path


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(map(str, problem["loc"]))
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; {hint(name, Prices.model_fields)}"
        elif problem["type"] == "float_type":
            message = f"is {problem['input']!r}; expected a number such as 0.023"
        lines.append(f"prices.{name}: {message}")
    return "; ".join(lines)


def hint(name: str, known: Iterable[str]) -> str:
    """The nearest known name, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"


def _not_negative(**amounts: Any) -> None:
    for name, amount in amounts.items():
        if not amount >= 0:  # also refuses NaN
            raise ValueError(f"{name.rstrip('_')} is {amount}; expected 0 or more")
