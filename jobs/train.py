"""Cached features become an adapter: `crab run SPEC` with `job: train`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crab.adapter.health import Alarm
from crab.evaluate import get_task
from crab.model.artifact import verify_model
from crab.model.initial import DIGEST as INITIAL_DIGEST
from crab_platform import gauges, ray_cluster, tracking
from crab_platform.catalog import Manifest
from crab_platform.identity import digest
from crab_platform.own_cost import cost_till_now
from crab_platform.training import Recipe, TrainingConfig, train
from jobs.adapters import adapter_digest
from jobs.answers import Asking, ask
from jobs.caches import held, record_reading
from jobs.chosen import Chosen, choose
from jobs.data import samples_digest
from jobs.features import Item, open_manifest
from jobs.output import RESULT, line, progress, read_result, table, write_result
from jobs.presets import crab_model_config, llm_digest
from jobs.recipe import CrabRecipe, micro_batch_size
from jobs.spec import SpecError, TrainSpec, record_digest, spec_digest, spec_record

_PLACEMENT = ("name", "runs", "tracking", "workers", "features")
_PROBE_TOKENS = 400
STEPS = "steps.jsonl"
"""Beside the adapter: a line a step with its metrics. Steps after the last checkpoint of a killed run stand twice."""


def run(spec: TrainSpec) -> dict[str, Any]:
    """Trains, exports, and returns result.json of the run. A run that is complete is not done again."""
    manifest = open_manifest(spec.features, spec.runs)
    chosen = choose(spec, manifest)
    base, model = model_digests(spec)
    # What is learnt: the spec without its placement, the model as it is resolved, the features, and what is asked.
    # A spec without validation means what it meant before there was one.
    unsaid = () if spec.validation else ("validation",)
    learner = {"spec": spec_digest(spec, (*_PLACEMENT, *unsaid, "model")), "model": model}
    samples = samples_digest(item.sample for item in chosen.items)
    identity = digest(learner | {"manifest": manifest.digest, "samples": samples})
    finished = read_result(spec.folder)
    if finished is not None and finished.get("identity") == identity:
        try:
            verify_model(finished["adapter"])
        except (FileNotFoundError, ValueError) as error:
            line(f"{spec.name}: trained already, but {error}")
        else:
            line(f"{spec.name}: trained already, nothing to do. Adapter: {finished['adapter']}")
            return finished
    check_answers(chosen.items)
    _tell(spec, chosen)
    # Without the data: a checkpoint of other data lies here, and is refused, instead of being passed over unseen.
    folder = spec.folder / digest(learner)[:12]
    adapter = folder / "adapter"
    config = training_config(spec, folder)
    losses: list[float] = []
    steps: list[int] = []
    alarm = Alarm()
    with (
        tracking.start_run(
            spec.tracking.uri,
            spec.tracking.experiment,
            spec.name,
            spec=spec_record(spec),
            folder=spec.folder,
            resume=identity,
        ) as run_,
        held(spec.features.cache, manifest, spec.name),
        ray_cluster.connected(),
        progress("steps", spec.optimisation.steps) as bar,
    ):
        run_.dataset(spec.name, manifest.digest, f"{spec.features.cache.url}/{manifest.path}")
        folder.mkdir(parents=True, exist_ok=True)

        def on_metrics(metrics: dict[str, float]) -> None:
            step = int(metrics["step"])
            if step != (steps[-1] if steps else 0) + 1:
                line(f"{spec.name}: goes on after step {step - 1}, from its checkpoint")
            steps.append(step)
            if (warning := alarm.look(metrics)) is not None:
                line(f"{spec.name}: step {step}: {warning}")
                run_.tag("router_alarm", f"step {step}: {warning}")
            if "router/entropy" in metrics:
                metrics["router/alarm"] = float(alarm.raised)
            with (folder / STEPS).open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            values = {name: v for name, v in metrics.items() if name != "step"}
            run_.metrics(values, step)
            gauges.show(spec.name, values | cost_till_now())
            losses.append(metrics["loss"])
            bar(step, spec.optimisation.steps)

        lineage = {
            "manifest": manifest.digest,
            "base_model": base,
            "identity": identity,
            "mlflow_run": run_.run_id,
        }
        build: Callable[[], Recipe] = partial(CrabRecipe, spec, manifest, adapter, lineage)
        trained = train(build, config, on_metrics)
        made_with = tracking.flatten(lineage | {"model": spec.model.model_dump(mode="json")})
        run_.model(spec.name, adapter, made_with, spec.optimisation.steps)
        rates = _parse_rates(spec, adapter, manifest, chosen.probes)
        run_.metrics(rates, spec.optimisation.steps)
        result: dict[str, Any] = {
            "job": spec.job,
            "name": spec.name,
            "identity": identity,
            "manifest": manifest.digest,
            "adapter": str(adapter),
            "mlflow_run": run_.run_id,
            "first_loss": losses[0] if losses else None,
            "metrics": trained.metrics | rates,
            "left_out": chosen.left_out,
        }
        write_result(spec.folder, result)
        run_.file(spec.folder / RESULT)
        record_reading("train", spec, run_.run_id, manifest, adapter_digest(adapter))
    table(spec.name, ("last step", "value"), sorted(result["metrics"].items()))
    line(f"adapter: {adapter}")
    return result


def training_config(spec: TrainSpec, folder: Path) -> TrainingConfig:
    """How a train job is run; its checkpoints lie below `folder`."""
    return TrainingConfig(
        name="ray",
        storage_path=str(folder),
        num_workers=spec.workers.count,
        min_workers=spec.workers.min_count,
        cpus_per_worker=spec.workers.cpus,
        use_gpu=spec.workers.gpu,
        micro_batches=spec.workers.micro_batches,
        micro_batch_size=micro_batch_size(spec),
        zero_stage=spec.workers.zero_stage,
        offload=spec.workers.offload,
        dtype=spec.optimisation.dtype,
        max_grad_norm=spec.optimisation.max_grad_norm,
        weight_decay=spec.optimisation.weight_decay,
        checkpoint_every=spec.workers.checkpoint_every,
        validate_every=spec.validation.every if spec.validation else 0,
        max_failures=spec.workers.max_failures,
        changed_data=spec.workers.changed_data,
    )


def model_digests(spec: TrainSpec) -> tuple[str, str]:
    """(digest of the language model, digest of the whole model before training), wherever their files lie."""
    config = crab_model_config(spec.model)
    if config.llm.path is None:
        raise SpecError("model.llm: training needs the folder of a language model")
    base = llm_digest(config.llm.path)
    record = config.model_dump(mode="json")
    record["llm"]["path"] = base
    if config.initial is not None:
        record["initial"] = (Path(config.initial) / INITIAL_DIGEST).read_text().strip()
    return base, record_digest(record)


def _tell(spec: TrainSpec, chosen: Chosen) -> None:
    counts = Counter(item.sample.task for item in chosen.items)
    line(
        f"{spec.name}: {len(chosen.items)} train samples ("
        + ", ".join(f"{count} {task}" for task, count in counts.items())
        + ")"
    )
    if chosen.left_out:
        line("left out: " + ", ".join(f"{n} ({reason})" for reason, n in chosen.left_out.items()))


def _parse_rates(
    spec: TrainSpec, adapter: Path, manifest: Manifest, probes: Sequence[Item]
) -> dict[str, float]:
    """parse_rate/TASK: the share of answers to `probes` that are of the task's grammar."""
    if not probes:
        return {}
    how = Asking(
        adapter=adapter,
        features=spec.features,
        manifest=manifest,
        max_new_tokens=_PROBE_TOKENS,
        device="cuda" if spec.workers.gpu else "cpu",
    )
    task_of = {item.sample.id: item.sample.task for item in probes}
    read: dict[str, list[bool]] = {}
    for sample_id, said in ask(how, probes):
        task = task_of[sample_id]
        read.setdefault(task, []).append(get_task(task).parse(said.text) is not None)
    return {f"parse_rate/{task}": sum(found) / len(found) for task, found in sorted(read.items())}


def check_answers(items: Sequence[Item]) -> None:
    """A model that is shown answers which its task cannot read would learn to be scored as wrong."""
    wrong = []
    for item in items:
        task = get_task(item.sample.task)
        if task.parse(task.target(item.sample)) is None:
            wrong.append(item.sample)
    if wrong:
        raise SpecError(
            f"{len(wrong)} train samples have an answer that task {wrong[0].task!r} cannot read, the first is "
            f"{wrong[0].id!r}: {wrong[0].answer!r}. crab/tasks/{wrong[0].task}.py states the grammar"
        )
