"""The adapter answers held-out samples and is scored: `crab run SPEC` with `job: evaluate`.

The run's folder then holds what `crab report` shows: result.json, predictions.jsonl and masks/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from crab.evaluate import Baseline, constant_baseline, get_task, of_the_way, render_table, score
from crab.samples import Sample
from crab.tasks import Metrics, avqa
from crab_platform import tracking
from crab_platform.identity import digest
from jobs.adapters import adapter_digest, find_adapter, language_model_of
from jobs.answers import Asking, ask
from jobs.caches import held, record_reading
from jobs.data import Dataset, load_dataset, samples_digest
from jobs.features import Usable, open_manifest, usable
from jobs.output import RESULT, console, line, progress, read_result, write_result
from jobs.predictions import MASKS, PREDICTIONS, Predictions
from jobs.spec import EvaluateSpec, spec_digest, spec_record

_PLACEMENT = ("name", "runs", "tracking", "workers", "device", "features")
_MASKS_FOR_MLFLOW_BYTES = 20 << 20
"""Masks that are larger together stay in the run's folder only."""
_AVQA = "avqa"


def run(spec: EvaluateSpec) -> dict[str, Any]:
    """Answers, scores, and returns result.json of the run. A run that is complete is not done again."""
    adapter = find_adapter(spec.adapter, spec.runs)
    language_model_of(adapter)  # a wrong one is told here in one line, before there are workers
    manifest = open_manifest(spec.features, spec.runs)
    datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
    found = usable(datasets, manifest, spec.tasks, spec.split)
    asked, left_out = choose_asked(found, spec.samples_per_task)
    train = _train_samples(datasets, spec.tasks)
    identity = digest(
        {
            "spec": spec_digest(spec, _PLACEMENT),
            "manifest": manifest.digest,
            "adapter": adapter_digest(adapter),
            "samples": samples_digest([*asked, *train]),
        }
    )
    finished = read_result(spec.folder)
    if finished is not None and finished.get("identity") == identity:
        line(f"{spec.name}: evaluated already, nothing to do. Remove {spec.folder} to do it again")
        return finished
    (spec.folder / RESULT).unlink(missing_ok=True)
    how = Asking(
        adapter=adapter,
        features=spec.features,
        manifest=manifest,
        max_new_tokens=spec.max_new_tokens,
        device=spec.device,
        workers=spec.workers,
        batch_size=spec.batch_size,
    )
    wanted = {sample.id for sample in asked}
    items = [item for item in found.items if item.sample.id in wanted]
    predictions = Predictions(spec.folder, asked)
    with (
        tracking.start_run(
            spec.tracking.uri,
            spec.tracking.experiment,
            spec.name,
            spec=spec_record(spec),
            folder=spec.folder,
        ) as run_,
        held(spec.features.cache, manifest, spec.name),
    ):
        run_.dataset(spec.name, manifest.digest, f"{spec.features.cache.url}/{manifest.path}")
        with progress("answers", len(items)) as bar:
            for sample_id, said in ask(how, items):
                predictions.add(sample_id, said)
                bar(len(predictions), len(items))
        if len(predictions) != len(items):
            raise RuntimeError(f"{len(items)} samples were asked, {len(predictions)} answered")
        predictions.write()
        scores = score(asked, predictions)
        constants = {task: constant_baseline(task, train, asked) for task in scores}
        result = {
            "job": spec.job,
            "name": spec.name,
            "identity": identity,
            "adapter": str(adapter),
            "manifest": manifest.digest,
            "split": spec.split,
            "scores": scores,
            "constants": {
                task: {"text": best[0].text, "metrics": best[1]} if best else None
                for task, best in constants.items()
            },
            "of_the_way": {
                task: of_the_way(get_task(task), metrics, _metrics_of(constants[task]))
                for task, metrics in scores.items()
            },
            "type_priors": _type_priors(train, asked),
            "left_out": left_out,
            "mlflow_run": run_.run_id,
        }
        write_result(spec.folder, result)
        record_reading("evaluate", spec, run_.run_id, manifest, adapter_digest(adapter))
        run_.metrics(_flat(scores, constants))
        run_.file(spec.folder / RESULT)
        run_.file(spec.folder / PREDICTIONS)
        if 0 < predictions.masks_bytes() <= _MASKS_FOR_MLFLOW_BYTES:
            run_.file(spec.folder / MASKS, MASKS)
    width = console.width if console.is_terminal else 110
    _show(result, render_table(scores, constants, width))
    return result


def _train_samples(datasets: Sequence[Dataset], tasks: Sequence[str]) -> list[Sample]:
    """What constant answers are made of: features are not needed for that, labels are."""
    return [
        sample
        for dataset in datasets
        for sample in dataset.samples
        if sample.split == "train" and sample.task in tasks and "weak" not in sample.label
    ]


def choose_asked(found: Usable, limit: int | None) -> tuple[list[Sample], dict[str, list[str]]]:
    """(the samples that are scored: the first `limit` of each task, reason -> ids of those that cannot be asked).

    A sample without features is among both: its answer counts as wrong. One without a label cannot be scored.
    """
    taken: Counter[str] = Counter()
    asked = []
    for sample in found.with_label:
        taken[sample.task] += 1
        if limit is None or taken[sample.task] <= limit:
            asked.append(sample)
    wanted = {sample.id for sample in asked}
    lost = {
        reason: [sample_id for sample_id in ids if sample_id in wanted]
        for reason, ids in found.no_features.items()
    }
    return asked, {reason: ids for reason, ids in (lost | found.no_label).items() if ids}


def _type_priors(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, Metrics]:
    """What is reached by reading the question alone; only AVQA asks more than one."""
    train, test = ([s for s in samples if s.task == _AVQA] for samples in (train, test))
    if not train or not test:
        return {}
    return {_AVQA: get_task(_AVQA).score(test, avqa.type_prior(train, test))}


def _metrics_of(best: Baseline | None) -> Metrics | None:
    return None if best is None else best[1]


def _flat(
    scores: Mapping[str, Metrics], constants: Mapping[str, Baseline | None]
) -> dict[str, float]:
    """Names as MLflow groups them: task/metric, and task/constant_METRIC for the headline."""
    flat = {f"{task}/{name}": v for task, metrics in scores.items() for name, v in metrics.items()}
    for task, best in constants.items():
        if best is not None:
            headline = get_task(task).headline
            flat[f"{task}/constant_{headline}"] = best[1][headline]
    return flat


def _show(result: Mapping[str, Any], scores: str) -> None:
    line(scores)
    for task, metrics in result["type_priors"].items():
        console.print(
            f"{task}: the commonest answer to each type of question, blind to the clip, reaches "
            f"{metrics[get_task(task).headline]:.3f}"
        )
    for reason, ids in result["left_out"].items():
        console.print(
            f"{len(ids)} samples not asked ({reason}): {', '.join(ids[:5])}"
            + (" ..." if len(ids) > 5 else "")
        )
    line(f"to look at it: crab report {result['name']}")
