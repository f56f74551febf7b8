"""One example: what was asked, said and expected about a clip, as the page shows it.

What an answer shows beyond its words depends on `Task.needs` (boxes, masks, classes) and on the type of the parsed
answer (events get timelines), so a task that is added is shown without a change here. The truth of words, boxes and
events is the sample's own answer, read by the task's parser; that of masks is in the mask files.
"""

from collections.abc import Sequence
from dataclasses import replace

from crab.report.asked import Asked
from crab.report.clip import Clip
from crab.report.files import Files
from crab.report.frames import box, strip
from crab.report.masked import with_classes, with_masks
from crab.report.texts import clean, in_parts
from crab.report.timelines import timeline
from crab.report.views import Example, Text
from crab.samples import Sample
from crab.tasks import Task


def show(task: Task, asked: Asked, clip: Clip, files: Files) -> Example:
    """Writes the pictures and the sound of one example and returns its view."""
    sample, answer = asked.sample, asked.answer
    parsed = None if answer is None else task.parse(answer.text)
    truth = task.parse(sample.answer) if asked.has_truth else None
    example = Example(
        title=asked.title,
        sample_id=clean(sample.id),
        goodness=asked.goodness,
        request=clean(task.request(sample)),
        said=None if answer is None else in_parts(answer.text),
        notes=(*_notes(task, asked, parsed), *clip.problems),
        expected=_expected(task, sample) if asked.has_truth else (),
        answer=_short(parsed, answer.text if answer else ""),
        wanted=_short(truth, sample.answer),
        timeline=timeline(parsed, truth, asked.has_truth),
    )
    if len(clip.sound):
        sound = files.mp3(clip.sound, clip.sample_rate_hz)
        example = replace(example, sound=sound, sound_s=len(clip.sound) / clip.sample_rate_hz)
    if not len(clip.frames):
        return example
    if task.needs == "classes":
        return with_classes(example, asked, clip, files)
    if task.needs == "mask":
        return with_masks(example, task, asked, clip, files)
    if task.needs == "box":
        example = replace(example, box=box(sample, parsed, truth, clip, files))
        if len(clip.frames) == 1 and example.box is not None:
            return example
    return replace(example, rows=(strip(clip, files),))


def _notes(task: Task, asked: Asked, parsed: object | None) -> list[str]:
    notes = []
    if asked.answer is None:
        notes.append(
            "No answer: the model was not asked, as the clip has no features. It counts as wrong."
        )
    elif parsed is None:
        notes.append(f"Not an answer in the grammar of {task.name}: it counts as wrong.")
    if not asked.finished:
        notes.append("Cut off: the model had not finished when its limit of tokens came.")
    return notes


def _expected(task: Task, sample: Sample) -> tuple[Text, ...]:
    captions = sample.label.get("captions")
    if isinstance(captions, Sequence) and not isinstance(captions, str) and captions:
        return tuple(Text(prose=clean(str(caption)), tagged="") for caption in captions)
    return (in_parts(task.target(sample)),)


def _short(parsed: object | None, text: str) -> str:
    """A word that was picked out of its tags; "" where the whole text is the answer, or it is no word."""
    return clean(parsed) if isinstance(parsed, str) and "<" in text else ""
