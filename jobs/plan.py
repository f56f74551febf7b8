"""What a spec would do, and what that costs: `crab plan SPEC`. Touches nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from crab_platform.catalog import manifest_path
from crab_platform.cost import Profile, load_profile
from crab_platform.estimate import Estimate, estimate
from crab_platform.explain import Differences
from crab_platform.plan import Aside, Plan, make_plan, set_aside_before
from crab_platform.plan_table import Counted, Outcome
from crab_platform.storage import Store, open_store
from crab_platform.work import Source, Work
from jobs.caches import check_sees_what_it_writes, open_cache
from jobs.data import load_dataset, merge_sources
from jobs.output import line, progress, read_result
from jobs.plan_media import by_folder, clips_of, hash_clips
from jobs.plan_show import show_plan, show_step
from jobs.preprocess import build_work
from jobs.spec import (
    EvaluateSpec,
    Job,
    PreprocessSpec,
    SequenceSpec,
    Spec,
    SpecError,
    SynthSpec,
    TrainSpec,
    TuneSpec,
)
from jobs.spec_cache import SIGNING_KEY_VARIABLE

_HEX = set("0123456789abcdef")


def plan_spec(
    spec: Spec,
    *,
    profile: str | None = None,
    hashed: bool = False,
    limit: int = 20,
    clips_to: Path | None = None,
) -> dict[str, Any]:
    """Shows the plan of a job, or of each step of a sequence, and returns it as plain values.

    Args:
        profile: name or path of a profile; its prices make seconds and bytes into money.
        hashed: read files whose content is not known yet, to be sure.
        limit: so many streams of clips that are no hits stand in the result.
        clips_to: new file for all of them, a line of JSON each.

    Raises:
        SpecError: data that is not there, or `clips_to` that is.
        StoreUnreachable: the cache cannot be reached.
    """
    steps = spec.steps if isinstance(spec, SequenceSpec) else [spec]
    priced = load_profile(profile) if profile else None
    if clips_to is not None and sum(isinstance(step, PreprocessSpec) for step in steps) != 1:
        raise SpecError("--clips-to needs a spec with exactly one preprocess job")
    results = []
    for number, step in enumerate(steps):
        if isinstance(step, PreprocessSpec):
            result = _waits(step, steps[:number])
            if result is None:
                results.append(_preprocess(step, priced, hashed, limit, clips_to))
                continue
        elif isinstance(step, TrainSpec | EvaluateSpec):
            result = _reads(step, steps[:number])
        elif isinstance(step, TuneSpec):
            result = _reads(step.train, steps[:number]) | {"job": step.job, "trials": _trials(step)}
        else:
            result = {"job": step.job, "name": step.name, "cache": None}
        show_step(result)
        if isinstance(step, TrainSpec | TuneSpec):
            result["memory"] = _memory(step if isinstance(step, TrainSpec) else step.train)
        results.append(result)
    if isinstance(spec, SequenceSpec):
        return {"job": spec.job, "name": spec.name, "steps": results}
    return results[0]


def sources_of(spec: PreprocessSpec) -> list[Source]:
    """The files of a job, in the order in which they are planned."""
    datasets = [load_dataset(source, spec.sampling.tasks) for source in spec.data]
    return by_folder(merge_sources(source for dataset in datasets for source in dataset.sources))


def _preprocess(
    spec: PreprocessSpec,
    profile: Profile | None,
    hashed: bool,
    limit: int,
    clips_to: Path | None,
) -> dict[str, Any]:
    check_sees_what_it_writes(spec.cache)
    if spec.cache.zone and SIGNING_KEY_VARIABLE not in os.environ:
        line(
            f"to run it, {SIGNING_KEY_VARIABLE} must name the file of zone {spec.cache.zone!r}'s private key"
        )
    sources = sources_of(spec)
    work = build_work(spec)
    # Neither signs nor keeps anything on a local disk.
    cache = open_cache(spec.cache.model_copy(update={"zone": "", "local": None}))
    with progress("clips", len(sources)) as bar:
        plan = make_plan(
            cache,
            work,
            clips_of(sources),
            before=_before(spec, cache.store),
            limit=limit,
            hash_clips=hash_clips if hashed else None,
            on_progress=lambda done: bar(done, len(sources)),
        )
    cost = estimate(plan, work, profile.prices if profile else None)
    result = record(spec, work, plan, cost, profile)
    show_plan(result)
    if clips_to is not None:
        _write_clips(clips_to, plan.outcomes(source.name for source in sources))
    return result


def _before(spec: PreprocessSpec, store: Store) -> dict[tuple[str, str], Aside]:
    result = read_result(spec.folder)
    if result is None or result.get("cache") != spec.cache.url:
        return {}
    return set_aside_before(store, str(result.get("manifest")))


def _waits(spec: PreprocessSpec, earlier: Sequence[Job]) -> dict[str, Any] | None:
    """The step of a sequence that makes the clips, when they are not made yet."""
    for source in spec.data:
        place = source.samples or source.files
        assert place is not None
        makers = [s for s in earlier if isinstance(s, SynthSpec) and _is_below(place, s.out)]
        if makers and not Path(place).exists():
            return {
                "job": spec.job,
                "name": spec.name,
                "cache": spec.cache.url,
                "waits_for": makers[-1].name,
                "absent": place,
            }
    return None


def _is_below(place: str, folder: str) -> bool:
    return Path(place).is_relative_to(folder)


def _reads(spec: TrainSpec | EvaluateSpec, earlier: Sequence[Job]) -> dict[str, Any]:
    """Which manifest a job reads, and whether it is there."""
    name = spec.features.manifest
    digest: str | None = name if len(name) == 64 and set(name) <= _HEX else None
    makers = [step.name for step in earlier if isinstance(step, PreprocessSpec)]
    if digest is None:
        made = read_result(Path(spec.runs) / name)
        digest = str(made["manifest"]) if made and "manifest" in made else None
    there = False
    if digest is not None:
        there = open_store(spec.features.cache.url).exists(manifest_path(digest))
    return {
        "job": spec.job,
        "name": spec.name,
        "cache": spec.features.cache.url,
        "needs": name,
        "manifest": digest,
        "is_there": there,
        "made_by": name if name in makers else None,
    }


def _trials(spec: TuneSpec) -> dict[str, int]:
    """How much a sweep trains at the most, in steps of one trial; early stopping makes it less."""
    settings = 1 + len(spec.confirm.compare)
    steps = spec.train.optimisation.steps
    found = {
        "samples": spec.search.samples,
        "steps_at_most": spec.search.samples * steps,
        "steps_again": settings * spec.confirm.seeds * steps,
    }
    line(
        f"{spec.name}: {found['samples']} samples of {', '.join(spec.space)}, {found['steps_at_most']:,} steps at "
        f"most, then {settings} settings on {spec.confirm.seeds} seeds, {found['steps_again']:,} steps. Memory is that "
        "of the settings in train"
    )
    return found


def _memory(spec: TrainSpec) -> dict[str, Any]:
    # Not for every plan: it imports torch.
    from jobs.plan_memory import memory_of, show_memory

    memory = memory_of(spec)
    show_memory(memory)
    return memory


def record(
    spec: PreprocessSpec, work: Work, plan: Plan, cost: Estimate, profile: Profile | None
) -> dict[str, Any]:
    """The plan as plain values: `crab plan --json`."""
    config = work.config
    return {
        "job": spec.job,
        "name": spec.name,
        "cache": spec.cache.url,
        "clips": plan.clips,
        "streams": plan.streams,
        **plan.statuses,
        "groups": [_group(counted) for counted in plan.groups],
        "sample": [outcome_record(outcome) for outcome in plan.sample],
        "not_used_commits": dict(plan.skipped_commits),
        "files_to_read": plan.to_read,
        "bytes_to_read": plan.bytes_to_read,
        "files_of_unknown_size": plan.size_unknown,
        "files_to_hash": plan.to_hash,
        "bytes_to_write": cost.bytes_to_write,
        "cpu_s": cost.cpu_s,
        "gpu_s": cost.gpu_s,
        "wall_s": cost.wall_s,
        "workers": {
            "mode": config.mode,
            "encode_actors": config.encode_actors,
            "decode_processes": config.decode_processes,
            "decode_tasks": config.decode_tasks,
        },
        "spared_decode_s": plan.spared[0],
        "spared_encode_s": plan.spared[1],
        "by_stream": [
            {
                "stream": one.stream,
                "encode": one.encode,
                "decode": one.decode,
                "device": one.device,
                "bytes_to_write": one.bytes_to_write,
                "decode_s": one.decode_total_s,
                "encode_s": one.encode_total_s,
                "rate_bytes": one.entry_bytes.record() if one.entry_bytes else None,
                "rate_decode_s": one.decode_s.record() if one.decode_s else None,
                "rate_encode_s": one.encode_s.record() if one.encode_s else None,
                "pays_from_reuses": one.verdict.reuses if one.verdict else None,
                "verdict": one.verdict.sentence if one.verdict else None,
            }
            for one in cost.streams
        ],
        "profile": profile.name if profile else None,
        "money": {
            "currency": cost.money.currency,
            "compute": cost.money.compute,
            "store_month": cost.money.store_month,
            "requests": cost.money.requests,
            "total": cost.money.total,
        }
        if cost.money
        else None,
        "notes": list(cost.notes),
    }


def fields_record(fields: Differences) -> list[dict[str, object]]:
    """How two keys differ, as plain values."""
    return [{"field": name, "cached": old, "wanted": new} for name, old, new in fields]


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """One stream of one clip, as plain values."""
    group = outcome.group
    return {
        "clip": outcome.name,
        "stream": group.stream,
        "status": group.status,
        "reason": group.reason,
        "detail": group.detail,
        "fields": fields_record(group.fields),
        "media_sha256": outcome.media_sha256,
        "decoded_kept": outcome.decoded_kept,
        "from": outcome.origin.record() if outcome.origin else None,
    }


def _group(counted: Counted) -> dict[str, Any]:
    group = counted.group
    return {
        "stream": group.stream,
        "status": group.status,
        "reason": group.reason,
        "detail": group.detail,
        "count": counted.count,
        "fields": fields_record(group.fields),
        "from": [{**origin.record(), "count": count} for origin, count in counted.origins],
    }


def _write_clips(path: Path, outcomes: Iterator[Outcome]) -> None:
    try:
        with path.open("x") as file:
            for outcome in outcomes:
                file.write(json.dumps(outcome_record(outcome)) + "\n")
    except FileExistsError as error:
        raise SpecError(f"{path} exists; --clips-to writes a new file") from error
    except OSError as error:
        raise SpecError(f"cannot write {path}: {error.strerror}") from error
