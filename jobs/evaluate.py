"""The adapter answers held-out samples and is scored: `crab run SPEC` with `job: evaluate`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from crab.evaluate import constant_baseline, get_task, render_table, score
from crab.predict import predict
from crab.samples import Sample
from crab.tasks import Metrics, avqa
from crab_platform import tracking
from jobs.adapters import find_adapter, load_adapter
from jobs.data import Dataset, load_dataset
from jobs.features import FeatureReader, Item, open_manifest, usable
from jobs.output import RESULT, console, progress, write_result
from jobs.spec import EvaluateSpec, spec_record

PREDICTIONS = "predictions.jsonl"
_AVQA = "avqa"


def run(spec: EvaluateSpec) -> dict[str, Any]:
    """Generates, scores, and returns result.json of the run."""
    folder = find_adapter(spec.adapter, spec.runs)
    manifest = open_manifest(spec.features, spec.runs)
    datasets = [load_dataset(source, spec.features.tasks) for source in spec.data]
    items, left_out = usable(datasets, manifest, spec.tasks, spec.split)
    asked = _first_of_each(_samples(datasets, spec, spec.split), spec.samples_per_task)
    model, collate = load_adapter(folder, spec.device)
    config = model.config
    layers = {"video": config.video.layer, "image": config.video.layer, "audio": config.audio.layer}
    reader = FeatureReader(spec.features, manifest, layers)
    wanted = {sample.id for sample in asked}
    items = [item for item in items if item.sample.id in wanted]
    # Like lengths together: predict() sorts within what it is given, a few batches at a time keep memory bounded.
    items.sort(key=lambda item: (item.sample.task, len(item.sample.instruction)))
    texts: dict[str, str] = {}
    with (
        tracking.start_run(
            spec.tracking.uri, spec.tracking.experiment, spec.name, spec=spec_record(spec)
        ) as run_,
        progress("answers", len(items)) as bar,
    ):
        run_.dataset(spec.name, manifest.digest, f"{spec.features.cache}/{manifest.path}")
        for start in range(0, len(items), spec.batch_size):
            part: Sequence[Item] = items[start : start + spec.batch_size]
            found = predict(
                model,
                collate,
                reader.examples(part),
                max_new_tokens=spec.max_new_tokens,
                batch_size=spec.batch_size,
            )
            texts |= {prediction.sample_id: prediction.text for prediction in found}
            bar(start + len(part), len(items))
        scores = score(asked, texts)
        train = _samples(datasets, spec, "train")
        baselines = {task: constant_baseline(task, train, asked) for task in scores}
        priors = _type_priors(train, asked)
        _write_predictions(spec, asked, texts)
        result = _result(spec, str(folder), run_.run_id, scores, baselines, priors, left_out)
        run_.metrics(
            {f"{task}/{m}": v for task, values in scores.items() for m, v in values.items()}
        )
        run_.metrics(
            {
                f"{t}/constant_{get_task(t).headline}": b[1][get_task(t).headline]
                for t, b in baselines.items()
            }
        )
        write_result(spec.folder, result)
        run_.file(spec.folder / RESULT)
        run_.file(spec.folder / PREDICTIONS)
    console.print(render_table(scores, baselines))
    for task, metrics in priors.items():
        console.print(
            f"{task}: the commonest answer to each type of question, blind to the clip, reaches "
            f"{metrics[get_task(task).headline]:.3f}"
        )
    if left_out:
        console.print(f"without features, counted as wrong: {dict(left_out)}")
    return result


def _samples(datasets: Sequence[Dataset], spec: EvaluateSpec, split: str) -> list[Sample]:
    return [
        sample
        for dataset in datasets
        for sample in dataset.samples
        if sample.split == split and sample.task in spec.tasks
    ]


def _first_of_each(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    taken: Counter[str] = Counter()
    chosen = []
    for sample in samples:
        taken[sample.task] += 1
        if limit is None or taken[sample.task] <= limit:
            chosen.append(sample)
    return chosen


def _result(
    spec: EvaluateSpec,
    adapter: str,
    run_id: str,
    scores: dict[str, Metrics],
    baselines: dict[str, tuple[str, Metrics]],
    priors: dict[str, Metrics],
    left_out: Counter[str],
) -> dict[str, Any]:
    constants: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for task, (answer, metrics) in baselines.items():
        constants[task] = {"answer": answer, "metrics": metrics}
    return {
        "job": spec.job,
        "name": spec.name,
        "adapter": adapter,
        "split": spec.split,
        "scores": scores,
        "constants": constants,
        "beats_constant": sorted(
            task
            for task, metrics in scores.items()
            if metrics[get_task(task).headline] > baselines[task][1][get_task(task).headline]
        ),
        "type_priors": priors,
        "left_out": dict(left_out),
        "mlflow_run": run_id,
    }


def _type_priors(train: Sequence[Sample], test: Sequence[Sample]) -> dict[str, Metrics]:
    """What is reached by reading the question alone; only AVQA asks more than one."""
    train, test = ([s for s in samples if s.task == _AVQA] for samples in (train, test))
    if not train or not test:
        return {}
    return {_AVQA: get_task(_AVQA).score(test, avqa.type_prior(train, test))}


def _write_predictions(
    spec: EvaluateSpec, samples: Sequence[Sample], texts: dict[str, str]
) -> None:
    spec.folder.mkdir(parents=True, exist_ok=True)
    with (spec.folder / PREDICTIONS).open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {
                "id": sample.id,
                "task": sample.task,
                "instruction": sample.instruction,
                "text": texts.get(sample.id),
                "expected": f"{sample.reasoning} {sample.answer}".strip(),
            }
            file.write(json.dumps(row) + "\n")
