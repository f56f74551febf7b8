"""A page to look at: the scores of an evaluate run, and examples of each task, the worst first. `crab report RUN`.

The page is in the run's folder, with everything that it needs: report/index.html opens from the disk.
"""

from __future__ import annotations

import difflib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crab.evaluate import get_task
from crab.media import DecodePool
from crab.report.asked import Asked
from crab.report.clip import read_clips
from crab.report.examples import show
from crab.report.files import Files
from crab.report.page import INDEX, new_folder, write_page
from crab.report.scores import facts, read_scores, remarks, summary, title_of
from crab.report.texts import clean
from crab.report.views import Curve, Example, Page, Section
from crab.samples import Sample
from crab.sampling import music_avqa_audio
from crab.tasks import TASKS, Answer
from jobs.output import line, progress, read_result, write_result
from jobs.predictions import PREDICTIONS, read_masks
from jobs.spec import ReportSpec, Sampling, SpecError

FOLDER = "report"
STEPS = "steps.jsonl"
"""Beside an adapter, from jobs/train.py: a line a step. Importing it from there would import Ray and DeepSpeed."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A line of predictions.jsonl, not read further than it takes to choose."""

    task: str
    goodness: float | None
    line: str


def run(spec: ReportSpec) -> dict[str, Any]:
    """The report as a job, so that a sequence can end with it."""
    page = make_report(spec.run, spec.runs, spec.examples)
    result = {"job": spec.job, "name": spec.name, "run": spec.run, "page": str(page)}
    write_result(spec.folder, result)
    line(f"report: {page}")
    return result


def make_report(run: str, runs: str, examples: int = 6) -> Path:
    """Writes RUN/report/index.html anew and returns its path.

    `run` is the folder of an evaluate run or its name in `runs`; `examples` are shown of each task, two thirds of them
    the worst and the others the best. Raises SpecError where there is no such run or it has no answers.
    """
    if examples < 1:
        raise SpecError(f"examples is {examples}, expected 1 or more")
    folder = _find(run, runs)
    result = read_result(folder) or {}
    rows = _read_rows(folder / PREDICTIONS)
    chosen = {task: _choose(rows[task], examples) for task in TASKS if task in rows}
    with new_folder(folder / FOLDER) as work:
        shown = _show(chosen, folder, _sampling(result, runs), Files(work))
        scores = read_scores(result)
        sections = tuple(
            Section(
                task=task,
                title=title_of(task),
                score=next((score for score in scores if score.task == task), None),
                examples=shown[task],
                summary=summary([row.goodness for row in rows[task]]),
            )
            for task in chosen
        )
        page = Page(
            title=f"Report of {clean(str(result.get('name', folder.name)))}",
            facts=facts(result, sum(map(len, rows.values()))),
            sections=sections,
            scores=scores,
            curves=_curves(result, folder),
            remarks=remarks(result),
        )
        write_page(page, work)
    return folder / FOLDER / INDEX


def _find(run: str, runs: str) -> Path:
    """The folder of an evaluate run. Raises SpecError that says what to do."""
    for folder in (Path(runs) / run, Path(run)):
        if (folder / PREDICTIONS).is_file():
            return folder
    found = next((f for f in (Path(runs) / run, Path(run)) if f.is_dir()), None)
    result = read_result(found) if found else None
    if found and result and "adapter" in result and result.get("job") == "train":
        raise SpecError(
            f"run {run!r} is a train job: it has an adapter and no answers to show. Let it answer first: "
            f"crab run jobs/specs/evaluate-shapes.yaml --set adapter={found.name}, then crab report evaluate-shapes"
        )
    if found and result:
        raise SpecError(
            f"run {run!r} is a {result.get('job')} job and has no {PREDICTIONS}; a report needs an evaluate job"
            f" ({_finished(runs, run)})"
        )
    if found:
        raise SpecError(
            f"{found} has no {PREDICTIONS}: the evaluate job has not ended, or it is no run. Start the same"
            " `crab run SPEC` again, it goes on where it stopped"
        )
    raise SpecError(
        f"there is no run {run!r} in {runs}, and no such folder ({_finished(runs, run)}). "
        "crab run jobs/specs/evaluate-shapes.yaml makes one"
    )


def _finished(runs: str, run: str) -> str:
    names = sorted(path.parent.name for path in Path(runs).glob(f"*/{PREDICTIONS}"))
    near = difflib.get_close_matches(run, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"evaluated: {', '.join(names) or 'none yet'}"


def _read_rows(path: Path) -> dict[str, list[_Row]]:
    """The rows by task, those without an answer first, then by goodness."""
    rows: defaultdict[str, list[_Row]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                row = json.loads(text)
                task, goodness = str(row["sample"]["task"]), row["goodness"]
            except (ValueError, KeyError, TypeError) as error:
                raise SpecError(
                    f"{path}:{number}: not an answer of this version of crab ({type(error).__name__}: {error});"
                    " remove result.json of the run and evaluate again"
                ) from error
            rows[task].append(_Row(task=task, goodness=goodness, line=text))
    if not rows:
        raise SpecError(f"{path} holds no answers; evaluate with samples of at least one task")
    for found in rows.values():
        found.sort(key=lambda row: -1.0 if row.goodness is None else row.goodness)
    return dict(rows)


def _choose(rows: Sequence[_Row], count: int) -> list[tuple[str, _Row]]:
    """(title, row): the worst first and a third of the best at the end, at most one without an answer."""
    unanswered = sum(row.goodness is None for row in rows)
    skipped = max(0, unanswered - 1) if unanswered < len(rows) else 0
    rest = list(rows[skipped:])
    num_best = count // 3 if len(rest) > count else 0
    worst, best = rest[: count - num_best], rest[len(rest) - num_best :][::-1]
    titles = [f"Worst {place} of {len(rows)}" for place in range(1, len(worst) + 1)]
    titles += [f"Best {place} of {len(rows)}" for place in range(1, len(best) + 1)]
    return list(zip(titles, [*worst, *best], strict=True))


def _show(
    chosen: Mapping[str, Sequence[tuple[str, _Row]]], folder: Path, sampling: Sampling, files: Files
) -> dict[str, tuple[Example, ...]]:
    wanted = [pair for pairs in chosen.values() for pair in pairs]
    samples = [_sample(row, folder) for _, row in wanted]
    heard = [
        music_avqa_audio() if sample.task in sampling.tasks else sampling.audio()
        for sample in samples
    ]
    asked = [(s, sampling.num_frames, sound) for s, sound in zip(samples, heard, strict=True)]
    shown: defaultdict[str, list[Example]] = defaultdict(list)
    with (
        DecodePool(num_workers=min(2, len(os.sched_getaffinity(0)))) as pool,
        progress("examples", len(wanted)) as bar,
    ):
        clips = read_clips(pool, asked)
        for (title, row), sample, clip in zip(wanted, samples, clips, strict=True):
            said = json.loads(row.line)
            shown[row.task].append(
                show(
                    get_task(row.task),
                    Asked(
                        sample=sample,
                        answer=_answer(said, folder),
                        finished=bool(said["finished"]) or said["text"] is None,
                        goodness=row.goodness,
                        title=title,
                    ),
                    clip,
                    files,
                )
            )
            bar(sum(map(len, shown.values())), len(wanted))
    return {task: tuple(found) for task, found in shown.items()}


def _sample(row: _Row, folder: Path) -> Sample:
    try:
        return Sample.model_validate(json.loads(row.line)["sample"])
    except ValidationError as error:
        raise SpecError(f"{folder / PREDICTIONS}: a sample does not fit: {error}") from error


def _answer(said: Mapping[str, Any], folder: Path) -> Answer | None:
    if said["text"] is None:
        return None
    masks = said.get("masks")
    return Answer(text=said["text"], masks=read_masks(folder / masks) if masks else None)


def _sampling(result: Mapping[str, Any], runs: str) -> Sampling:
    """What the preprocess job of the run's features looked at; the default where it is not there any more."""
    for path in Path(runs).glob("*/result.json"):
        record = json.loads(path.read_text())
        if "sampling" in record and record.get("manifest") == result.get("manifest"):
            return Sampling.model_validate(record["sampling"])
    return Sampling()


def _curves(result: Mapping[str, Any], folder: Path) -> tuple[Curve, ...]:
    """Losses of the training behind the run, the total first; a step that was done twice counts once."""
    beside = [folder] + ([Path(result["adapter"]).parent] if "adapter" in result else [])
    path = next((place / STEPS for place in beside if (place / STEPS).is_file()), None)
    if path is None:
        return ()
    series: defaultdict[str, dict[float, float]] = defaultdict(dict)
    for text in path.read_text(encoding="utf-8").splitlines():
        metrics = json.loads(text)
        for name, value in metrics.items():
            if name.startswith("loss"):
                series[name][metrics["step"]] = value
    return tuple(
        Curve(name=clean(name), points=tuple(sorted(series[name].items())))
        for name in sorted(series)
    )
