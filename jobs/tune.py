"""A sweep: trials of a train job on cached features, the best one again on several seeds: `job: tune`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from crab_platform import ray_cluster, tracking
from crab_platform.budget import Budget, Limits
from crab_platform.capacity import NoRoom
from crab_platform.catalog import Manifest
from crab_platform.cost import load_profile
from crab_platform.identity import digest
from crab_platform.tuning import SweepFailed
from jobs.adapters import adapter_digest
from jobs.caches import held, record_reading
from jobs.chosen import choose
from jobs.data import samples_digest
from jobs.features import open_manifest
from jobs.output import RESULT, line, read_result, table, write_result
from jobs.run import JobFailed, run_spec
from jobs.spec import (
    SpecError,
    TuneSpec,
    load_spec,
    parse_spec,
    record_digest,
    spec_digest,
    spec_record,
)
from jobs.sweep_phases import Phases
from jobs.sweep_record import confirmed_values, sweep_values, winner_of
from jobs.sweep_report import make_sweep_report
from jobs.train import check_answers, model_digests
from jobs.trial_build import plain
from tune_spaces.space import describe, load_space

SWEEP = "sweep.json"
_NOT_LEARNT = ("name", "runs", "tracking", "workers", "features", "model")
_HOW_MANY = {"samples", "max_concurrent", "max_failures"}


def run(spec: TuneSpec) -> dict[str, Any]:
    """Searches, trains the winner again, exports it, and returns result.json. What is done is not done again."""
    try:
        space = load_space(spec.space)
        profile = load_profile(spec.prices) if spec.prices else None
    except ValueError as error:
        raise SpecError(str(error)) from error
    train = spec.train
    manifest = _warm(spec)
    chosen = choose(train, manifest)
    base, model = model_digests(train)
    samples = samples_digest(item.sample for item in (*chosen.items, *chosen.held_out))
    # What a trial learns and how the next one is found. How many there are is no part of it: more of them go on. Not so
    # in a population, whose members are compared with each other.
    how_many = _HOW_MANY - ({"samples"} if spec.search.scheduler == "pbt" else set())
    identity = digest(
        {
            "search": record_digest(spec.search.model_dump(exclude=how_many)),
            "space": record_digest(describe(space)),
            "train": spec_digest(train, _NOT_LEARNT),
            "model": model,
            "manifest": manifest.digest,
            "samples": samples,
        }
    )
    wanted = record_digest({"identity": identity, "spec": spec_record(spec)})
    finished = read_result(spec.folder)
    if finished is not None and finished.get("wanted") == wanted:
        line(f"{spec.name}: searched already, nothing to do. Report: {finished['report']}")
        return finished
    folder = spec.folder / identity[:12]
    phases = Phases(
        spec=spec, space=space, manifest=manifest, folder=folder, base=base, identity=identity
    )
    check_answers(chosen.items)
    phases.check()
    budget = Budget(
        need=phases.need,
        limits=Limits(**spec.budget.model_dump()),
        prices=profile.prices if profile else None,
    )
    whom = "members of a population" if spec.search.scheduler == "pbt" else "samples"
    line(
        f"{spec.name}: {spec.search.samples} {whom} of {space.name} ({', '.join(space.parameters)}), at most "
        f"{train.optimisation.steps} steps each, judged by {spec.search.metric} on {len(chosen.held_out)} samples"
    )
    began = time.monotonic()
    with (
        tracking.start_run(
            spec.tracking.uri,
            spec.tracking.experiment,
            spec.name,
            spec=spec_record(spec),
            tags={"manifest": manifest.digest},
            folder=spec.folder,
            resume=identity,
            resume_finished=True,
        ) as parent,
        held(train.features.cache, manifest, spec.name),
        ray_cluster.connected(),
    ):
        parent.dataset(spec.name, manifest.digest, f"{train.features.cache.url}/{manifest.path}")
        try:
            search = phases.search(parent, budget)
            winner = winner_of(search.trials, spec.search.metric, spec.search.mode)
            again = phases.confirm(
                parent, winner, search.trials, Budget(need=phases.need, prices=budget.prices)
            )
        except (NoRoom, SweepFailed) as error:
            raise JobFailed(f"{spec.name}: {error}") from error
        steps = train.optimisation.steps
        confirmed = confirmed_values(again.trials if again else [], spec.search.metric, steps)
        adapter = phases.keep_adapter(again.trials) if again else None
        sweep = sweep_values(
            spec,
            space,
            manifest=manifest.digest,
            identity=identity,
            trials=[phases.values(trial, budget) for trial in search.trials],
            confirmed=confirmed,
            budget=budget,
            wall_seconds=time.monotonic() - began,
            capacity=asdict(search.capacity),
            stopped_because=search.stopped_because,
            adapter=str(adapter) if adapter else None,
        )
        write_result(spec.folder, sweep, SWEEP)
        page = make_sweep_report(sweep, spec.folder)
        metrics = _summary(sweep)
        parent.metrics(metrics)
        result = {
            "job": spec.job,
            "name": spec.name,
            "identity": identity,
            "wanted": wanted,
            "manifest": manifest.digest,
            "sweep": str(spec.folder / SWEEP),
            "report": str(page),
            "adapter": str(adapter) if adapter else None,
            "winner": plain(winner.config) if winner else None,
            "confirmed": confirmed,
            "metrics": metrics,
            "stopped_because": search.stopped_because,
            "mlflow_run": parent.run_id,
        }
        write_result(spec.folder, result)
        parent.file(spec.folder / RESULT)
        parent.file(spec.folder / SWEEP)
        parent.file(page)
        if adapter:
            made_with = {"manifest": manifest.digest, **plain(winner.config)} if winner else {}
            parent.model(spec.name, adapter, made_with)
            record_reading("train", train, parent.run_id, manifest, adapter_digest(adapter))
    _show(sweep, page)
    return result


def _warm(spec: TuneSpec) -> Manifest:
    """The manifest of the features. Raises SpecError where there is none, unless the spec says what to run first."""
    try:
        return open_manifest(spec.train.features, spec.runs)
    except SpecError as error:
        if spec.preprocess is None:
            raise SpecError(
                f"{error}. A sweep does not start on a cold cache, where the first trials would pay for all. To have "
                "it filled first, name the spec: --set preprocess=jobs/specs/preprocess-shapes.yaml"
            ) from error
    first = spec.preprocess
    job = parse_spec(first) if isinstance(first, dict) else load_spec(first)
    line(f"{spec.name}: the features are not there; running {job.name} first")
    run_spec(job)
    return open_manifest(spec.train.features, spec.runs)


def _summary(sweep: Mapping[str, Any]) -> dict[str, float]:
    """What MLflow shows of a sweep beside its trials."""
    counts = Counter(trial["status"] for trial in sweep["trials"])
    spent = sweep["spent"]
    found = {f"trials/{status}": float(count) for status, count in counts.items()}
    found |= {f"spent/{name}": v for name, v in spent.items() if isinstance(v, float)}
    for setting in sweep["confirmed"]:
        name = tracking.plain_name(setting["label"])
        for figure in ("mean", "std"):
            if setting[figure] is not None:
                found[f"confirmed/{name}/{figure}"] = setting[figure]
    return found


def _show(sweep: Mapping[str, Any], page: Path) -> None:
    """For people, at the end."""
    best = sorted(
        (trial for trial in sweep["trials"] if trial["last"] is not None),
        key=lambda t: (-t["steps"], t["last"] if sweep["mode"] == "min" else -t["last"]),
    )
    names = list(sweep["space"])
    table(
        f"{sweep['name']}: the five best of {len(sweep['trials'])} trials",
        ("trial", *names, "steps", sweep["metric"], "status"),
        [
            (t["number"], *(t["config"].get(n) for n in names), t["steps"], t["last"], t["status"])
            for t in best[:5]
        ],
    )
    if sweep["confirmed"]:
        table(
            f"trained again on {max(len(s['seeds']) for s in sweep['confirmed'])} seeds",
            ("setting", "mean", "standard deviation", "each seed"),
            [
                (s["label"], s["mean"], s["std"], ", ".join(f"{v:.4g}" for v in s["values"]))
                for s in sweep["confirmed"]
            ],
        )
    if sweep["stopped_because"]:
        line(f"ended early: {sweep['stopped_because']}")
    line(f"report: {page}")
    if sweep["adapter"]:
        line(f"adapter: {sweep['adapter']}")
