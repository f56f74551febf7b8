"""The CACHE that commands take: a folder, s3://bucket/prefix, or a spec, whose trust and signing key then count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from crab_platform.cache import FeatureCache
from jobs.caches import open_cache
from jobs.spec import (
    EvaluateSpec,
    PreprocessSpec,
    SequenceSpec,
    Spec,
    SpecError,
    TrainSpec,
    TuneSpec,
)
from jobs.spec import load_spec as load_spec
from jobs.spec_cache import Cache

_SPEC_ENDINGS = (".yaml", ".yml")


def open_place(place: str, *, signs: bool = False) -> FeatureCache:
    """The cache that a person means. Touches nothing.

    `signs`: the command writes what readers must trust, so the key of the spec's zone is needed.

    Raises SpecError when there is no such folder, or the spec names no cache, several, or a zone without its key.
    """
    settings = cache_settings(place)
    if not signs:
        settings = settings.model_copy(update={"zone": ""})
    if "://" not in settings.url and not Path(settings.url).is_dir():
        raise SpecError(
            f"there is no cache in {settings.url}; a preprocess job makes one: "
            "crab run jobs/specs/preprocess-shapes.yaml"
        )
    return open_cache(settings)


def cache_settings(place: str) -> Cache:
    """The `cache:` of a spec, or one that has only a URL."""
    if not place.endswith(_SPEC_ENDINGS):
        return Cache(url=place)
    found = list(_caches(load_spec(place)))
    if not found:
        raise SpecError(f"{place} names no cache; give the spec of a preprocess job, or the cache")
    if any(other != found[0] for other in found):
        urls = ", ".join(sorted({one.url for one in found}))
        raise SpecError(f"the steps of {place} use caches that differ ({urls}); give one of these")
    return found[0]


def preprocess_spec(path: str) -> PreprocessSpec:
    """The preprocess job of a spec, or the only one of a sequence. Raises SpecError."""
    spec = load_spec(path)
    steps = spec.steps if isinstance(spec, SequenceSpec) else [spec]
    found = [step for step in steps if isinstance(step, PreprocessSpec)]
    if len(found) != 1:
        raise SpecError(f"{path} has {len(found)} preprocess jobs; give a spec with exactly one")
    return found[0]


def _caches(spec: Spec) -> Iterator[Cache]:
    if isinstance(spec, SequenceSpec):
        for step in spec.steps:
            yield from _caches(step)
    elif isinstance(spec, PreprocessSpec):
        yield spec.cache
    elif isinstance(spec, TrainSpec | EvaluateSpec):
        yield spec.features.cache
    elif isinstance(spec, TuneSpec):
        yield spec.train.features.cache
