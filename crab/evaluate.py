"""Scores of generated texts, by task, and the best that a constant answer reaches.

Texts come in by sample id. A sample without a text counts as an unreadable answer, so that clips which could not be
decoded lower the score instead of leaving the mean; `missing` says how many there were. A text for a sample that is not
there is a mix-up of files, and raises.
"""

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from crab.samples import Sample
from crab.tasks import TASKS, Metrics, Task


def get_task(name: str) -> Task:
    """The task of that name. ValueError with the nearest known name otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown task {name!r}, known are {', '.join(TASKS)}{hint}")


def score(samples: Sequence[Sample], texts_by_id: Mapping[str, str]) -> dict[str, Metrics]:
    """Metrics by task over all `samples` (fractions in 0..1, plus `missing` and `num_samples`)."""
    known = {sample.id for sample in samples}
    if strangers := sorted(texts_by_id.keys() - known):
        raise ValueError(
            f"{len(strangers)} texts belong to no given sample (first: {strangers[0]!r});"
            " score a prediction file with the samples it was made from"
        )
    by_task: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_task[sample.task].append(sample)
    scores: dict[str, Metrics] = {}
    for name, group in by_task.items():
        metrics = get_task(name).score(group, [texts_by_id.get(sample.id, "") for sample in group])
        missing = sum(sample.id not in texts_by_id for sample in group)
        scores[name] = metrics | {"missing": float(missing), "num_samples": float(len(group))}
    return scores


def constant_baseline(
    task: str, train: Sequence[Sample], test: Sequence[Sample]
) -> tuple[str, Metrics]:
    """The constant answer with the highest headline metric on `test`, and its metrics there.

    Candidates are all distinct answers of `train` and those that the task builds (`Task.constants`). The choice looks
    at `test`: no candidate does better there, which makes it a harder baseline than one chosen on `train`. Samples of
    other tasks are ignored.
    """
    judge = get_task(task)
    train = [sample for sample in train if sample.task == task]
    test = [sample for sample in test if sample.task == task]
    if not train or not test:
        raise ValueError(
            f"{len(train)} train and {len(test)} test samples of {task!r} given; each needs at least one"
        )
    scored = (
        (answer, judge.score(test, [answer] * len(test))) for answer in judge.constants(train)
    )
    return max(scored, key=lambda pair: pair[1][judge.headline])


def render_table(
    scores: Mapping[str, Metrics], baselines: Mapping[str, tuple[str, Metrics]], width: int = 100
) -> str:
    """Scores beside baselines as a text table: task, metric, score, best constant, parse rate, samples."""
    table = Table(title="Scores and the best constant answer (fractions, full denominators)")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("score", "constant", "parsed", "samples"):
        table.add_column(heading, justify="right")
    for name, metrics in scores.items():
        constant = baselines[name][1] if name in baselines else {}
        headline = get_task(name).headline
        shown = [headline] + [
            m for m in metrics if m not in (headline, "parse_rate", "missing", "num_samples")
        ]
        for row, metric in enumerate(shown):
            table.add_row(
                name if row == 0 else "",
                metric,
                f"{metrics[metric]:.3f}",
                f"{constant[metric]:.3f}" if metric in constant else "-",
                f"{metrics['parse_rate']:.3f}" if row == 0 else "",
                f"{metrics['num_samples']:.0f}" if row == 0 and "num_samples" in metrics else "",
            )
        table.add_section()
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
