"""The figures of an evaluate run (its result.json) as the page shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from crab.evaluate import FEW, best_possible, get_task, of_the_way
from crab.report.texts import clean
from crab.report.views import Score
from crab.tasks import TASKS, Metrics

_TITLES = {
    "ave": "Audio-visual event localisation",
    "avvp": "Audio-visual video parsing",
    "arig": "Audio-referred image grounding",
    "s4": "Segmentation, one source",
    "ms3": "Segmentation, several sources",
    "avss": "Semantic segmentation",
    "ref-avs": "Segmentation by reference",
    "avqa": "Question answering",
    "avcap": "Captioning",
}
_COUNTS = ("parse_rate", "missing", "num_samples")


def title_of(task: str) -> str:
    """A task's name in words; its own name where we know none."""
    return _TITLES.get(task, task)


def read_scores(result: Mapping[str, Any]) -> tuple[Score, ...]:
    """A line for each task that was scored, in the order of the table of tasks."""
    scores, constants = result.get("scores") or {}, result.get("constants") or {}
    return tuple(
        _score(task, scores[task], constants.get(task), result) for task in TASKS if task in scores
    )


def _score(
    name: str, metrics: Metrics, best: Mapping[str, Any] | None, result: Mapping[str, Any]
) -> Score:
    task = get_task(name)
    constant: Metrics | None = best["metrics"] if best else None
    prior = (result.get("type_priors") or {}).get(name)
    remark = ""
    if prior:
        remark = (
            "The commonest answer to each type of question, blind to the clip, reaches"
            f" {prior[task.headline]:.3f}."
        )
    return Score(
        task=name,
        title=title_of(name),
        metric=task.headline,
        value=metrics[task.headline],
        constant=constant[task.headline] if constant else None,
        constant_text=clean(str(best["text"])) if best else "",
        best_possible=best_possible(task, metrics),
        way=of_the_way(task, metrics, constant),
        parse_rate=metrics["parse_rate"],
        num_samples=int(metrics.get("num_samples", 0)),
        missing=int(metrics.get("missing", 0)),
        others=tuple(
            (metric, value, constant.get(metric) if constant else None)
            for metric, value in metrics.items()
            if metric not in _COUNTS
        ),
        remark=remark,
    )


def summary(goodness: Sequence[float | None]) -> str:
    """How good the answers of a task are one by one; None is a sample without an answer."""
    values = sorted(value for value in goodness if value is not None)
    if not values:
        return f"{len(goodness)} samples, none with an answer."
    without = len(goodness) - len(values)
    return (
        f"{len(goodness)} samples. Goodness of a single answer, 0 to 1: worst {values[0]:.2f}, median"
        f" {values[len(values) // 2]:.2f}, best {values[-1]:.2f}."
        + (f" {without} have no answer." if without else "")
    )


def facts(result: Mapping[str, Any], num_samples: int) -> tuple[tuple[str, str], ...]:
    """What stands under the title."""
    found = [("samples", str(num_samples))]
    found += [(name, str(result[name])) for name in ("split", "adapter") if name in result]
    return tuple((name, clean(value)) for name, value in found)


def remarks(result: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the scores must know."""
    few = [
        task
        for task, metrics in (result.get("scores") or {}).items()
        if metrics.get("num_samples", FEW) < FEW
    ]
    lines = [f"Scored on fewer than {FEW} samples, so rough: {', '.join(few)}."] if few else []
    for reason, ids in (result.get("left_out") or {}).items():
        first = ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "")
        lines.append(f"Not asked, {reason}: {len(ids)} of the samples, such as {first}")
    return tuple(clean(remark) for remark in lines)
