"""Scores of generated answers, by task, and the best that a constant answer reaches.

Answers come in by sample id. A sample without an answer counts as an unreadable one, so that clips which could not be
decoded lower the score instead of leaving the mean; `missing` says how many there were. An answer for a sample that is
not there is a mix-up of files, and raises.
"""

import difflib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from crab.samples import Sample
from crab.tasks import TASKS, Answer, Metrics, Task

FEW = 30
"""Below this many samples a score says little: at 30, one standard error of a share of a half is 9 points."""

_COUNTS = ("parse_rate", "missing", "num_samples")

Baseline = tuple[Answer, Metrics]


def get_task(name: str) -> Task:
    """The task of that name. ValueError with the nearest known name otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown task {name!r}, known are {', '.join(TASKS)}{hint}")


def score(samples: Sequence[Sample], answers_by_id: Mapping[str, Answer]) -> dict[str, Metrics]:
    """Metrics by task over all `samples`, in the order of `TASKS`, plus `missing` and `num_samples`.

    Each answer is looked up once and let go when it is scored, so `answers_by_id` may load masks as it is read.
    """
    known = {sample.id for sample in samples}
    if strangers := sorted(id_ for id_ in answers_by_id if id_ not in known):
        raise ValueError(
            f"{len(strangers)} answers belong to no given sample (first: {strangers[0]!r});"
            " score a prediction file with the samples it was made from"
        )
    by_task: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_task[get_task(sample.task).name].append(sample)
    scores: dict[str, Metrics] = {}
    for name, task in TASKS.items():
        if group := by_task.get(name):
            answers = _Answers(group, answers_by_id)
            metrics = task.score(group, answers)
            counts = {"missing": float(answers.missing), "num_samples": float(len(group))}
            scores[name] = metrics | counts
    return scores


class _Answers:
    """The answers to `samples`, looked up as they are asked for, and how many there were none of."""

    def __init__(self, samples: Sequence[Sample], answers_by_id: Mapping[str, Answer]) -> None:
        self.samples = samples
        self.answers_by_id = answers_by_id
        self.missing = 0

    def __iter__(self) -> Iterator[Answer]:
        for sample in self.samples:
            # `in` would load a lazily read answer once more.
            answer = self.answers_by_id.get(sample.id)
            self.missing += answer is None
            yield answer or Answer(text="")


def constant_baseline(
    task: str, train: Sequence[Sample], test: Sequence[Sample]
) -> Baseline | None:
    """The constant answer with the highest headline metric on `test`, and its metrics there.

    Candidates are those of `Task.constants`: answers of `train` and built ones. The choice looks at `test`: no
    candidate does better there, which makes it a harder baseline than one chosen on `train`. Samples of other tasks are
    ignored. None where there is no candidate: the task has no train sample, and builds no answer without one.
    """
    judge = get_task(task)
    train = [sample for sample in train if sample.task == task]
    test = [sample for sample in test if sample.task == task]
    if not test:
        raise ValueError(f"no test samples of {task!r} given; a baseline needs at least one")
    scored = (
        (answer, judge.score(test, itertools.repeat(answer, len(test))))
        for answer in judge.constants(train)
    )
    return max(scored, key=lambda pair: pair[1][judge.headline], default=None)


def best_possible(task: Task, metrics: Metrics) -> float:
    """What right answers would score: less than `Task.perfect` where the scorer says that these samples allow less."""
    return metrics.get(f"{task.headline}_attainable", task.perfect)


def of_the_way(task: Task, metrics: Metrics, constant: Metrics | None) -> float | None:
    """How far the headline is from the best constant answer (0) to the best possible one (1).

    Negative below the constant. None where there is no constant, or where none can be better.
    """
    if constant is None or constant[task.headline] >= best_possible(task, metrics):
        return None
    low = constant[task.headline]
    return (metrics[task.headline] - low) / (best_possible(task, metrics) - low)


def render_table(
    scores: Mapping[str, Metrics], baselines: Mapping[str, Baseline | None], width: int = 110
) -> str:
    """Scores beside baselines as a text table, a row a metric, with a line below it for each task of few samples."""
    table = Table(title="Scores, the best constant answer, and perfect (full denominators)")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("score", "constant", "perfect", "of the way", "parsed", "samples"):
        table.add_column(heading, justify="right")
    for name, metrics in scores.items():
        task, baseline = get_task(name), baselines.get(name)
        constant = None if baseline is None else baseline[1]
        way = of_the_way(task, metrics, constant)
        shown = [m for m in metrics if m not in (task.headline, *_COUNTS)]
        for metric in [task.headline, *shown]:
            first = metric == task.headline
            table.add_row(
                name if first else "",
                metric,
                f"{metrics[metric]:.3f}",
                f"{constant[metric]:.3f}" if constant and metric in constant else "-",
                f"{best_possible(task, metrics):.3f}" if first else "",
                "" if not first else "-" if way is None else f"{way:.0%}",
                f"{metrics['parse_rate']:.3f}" if first else "",
                f"{metrics['num_samples']:.0f}" if first and "num_samples" in metrics else "",
            )
        table.add_section()
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get() + "".join(f"{line}\n" for line in few_samples(scores))


def few_samples(scores: Mapping[str, Metrics]) -> list[str]:
    """A warning for each task that was scored on fewer than `FEW` samples."""
    return [
        f"warning: {name} was scored on {metrics['num_samples']:.0f} samples, fewer than {FEW}: its figures are rough"
        for name, metrics in scores.items()
        if metrics.get("num_samples", FEW) < FEW
    ]
