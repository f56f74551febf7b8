"""One adapter, any clips: decode, encode, answer. Nothing is cached and no Ray is started."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crab.encoders.base import Encoder
from crab.encoders.frozen import AudioEncoder, VisionEncoder
from crab.encoders.load import load_encoder
from crab.evaluate import get_task
from crab.media import Decoded, DecodePool, DecodeRequest, Failure
from crab.model.collate import Example
from crab.predict import Prediction, predict
from crab.report.asked import Asked
from crab.report.clip import read_clips
from crab.report.examples import show
from crab.report.files import Files
from crab.report.page import INDEX, check_folder, new_folder, write_page
from crab.report.scores import title_of
from crab.report.views import Page, Section
from crab.samples import Sample
from crab.tasks import Answer, avvp
from crab.tasks.spans import runs as runs_of
from jobs.adapters import find_adapter, load_adapter
from jobs.presets import encoder_configs
from jobs.spec import Encoders, Sampling, SpecError

_SILENT = ("no_audio_stream", "no_video_stream")


def predict_media(
    adapter: str | Path,
    media: Sequence[str],
    task: str,
    question: str | None = None,
    *,
    out: Path | None = None,
    encoders: Encoders | None = None,
    sampling: Sampling | None = None,
    runs: str = "work/runs",
    max_new_tokens: int = 400,
) -> list[dict[str, Any]]:
    """What the adapter says about each clip: {"media", "task", "text", "answer", "without"} or {"media", "problem"}.

    `without` names streams that the clip does not have; `answer` is the parsed answer, None where the text is not of
    the task's grammar. With `out`, a folder that is new or holds such a page, answers have "page" too: index.html with
    the frames, sound, masks, boxes or timelines of all clips. Raises ValueError for an unknown task, a question (the
    expression of ref-avs, the second of arig) that is missing or not wanted, a folder that holds other things, or an
    adapter that is none.
    """
    try:
        instruction = get_task(task).instruction(question)
    except ValueError as error:
        raise SpecError(f"{error} (--task, --question)") from error
    if out is not None:
        check_folder(out)
    needs_picture = get_task(task).needs != "text"
    sampling = sampling or Sampling()
    video, audio = (load_encoder(config) for config in encoder_configs(encoders or Encoders()))
    if not isinstance(video, VisionEncoder) or not isinstance(audio, AudioEncoder):
        raise SpecError("encoders: video needs an encoder of kind clip, audio one of kind beats")
    model, collate = load_adapter(find_adapter(str(adapter), os.path.abspath(runs)))
    requests = [
        DecodeRequest(source=url, video=sampling.video(video.image_size), audio=sampling.audio())
        for url in media
    ]
    answers: list[dict[str, Any]] = []
    asked: list[Asked] = []
    with DecodePool(num_workers=1) as pool:
        for url, result in zip(media, pool.decode(requests), strict=True):
            lost = result.decoded.problems()
            features = _features(result.decoded, video, audio)
            blind = needs_picture and not features.keys() & {"video", "image"}
            if not features or blind or any(failure.reason not in _SILENT for failure in lost):
                answers.append({"media": url, "problem": f"{lost[0].reason}: {lost[0].detail}"})
                continue
            sample = _sample(url, task, instruction, features, question)
            (found,) = predict(
                model,
                collate,
                [Example(sample=sample, features=features)],
                max_new_tokens=max_new_tokens,
            )
            answers.append(_answer(url, found, features))
            asked.append(_asked(sample, found))
        if out is not None and asked:
            page = _draw(pool, asked, task, sampling, out)
            answers = [a | {"page": str(page)} if "text" in a else a for a in answers]
    return answers


def _features(decoded: Decoded, video: Encoder, audio: Encoder) -> dict[str, dict[str, np.ndarray]]:
    """Stream -> layer -> array of what the clip has; a picture is a stream of its own."""
    picture = "image" if decoded.backend == "pillow" else "video"
    streams = ((picture, decoded.video, video), ("audio", decoded.audio, audio))
    return {
        name: encoder.encode(found)
        for name, found, encoder in streams
        if found is not None and not isinstance(found, Failure)
    }


def _answer(url: str, found: Prediction, features: Mapping[str, Any]) -> dict[str, Any]:
    parsed = get_task(found.task).parse(found.text)
    missing = {"audio"} if "image" in features else {"video", "audio"}
    return {
        "media": url,
        "task": found.task,
        "text": found.text,
        "answer": None if parsed is None else _plain(parsed),
        "without": sorted(missing - features.keys()),
    }


def _asked(sample: Sample, found: Prediction) -> Asked:
    return Asked(
        sample=sample,
        answer=Answer(text=found.text, masks=found.masks),
        finished=found.finished,
        has_truth=False,
    )


def _draw(
    pool: DecodePool, asked: Sequence[Asked], task: str, sampling: Sampling, out: Path
) -> Path:
    """The page of all answers, in the manner of a report; the clips are decoded once more, at the size of pictures."""
    wanted = [(one.sample, sampling.num_frames, sampling.audio()) for one in asked]
    with new_folder(out) as work:
        files = Files(work)
        clips = read_clips(pool, wanted)
        examples = tuple(
            show(get_task(task), one, clip, files) for one, clip in zip(asked, clips, strict=True)
        )
        section = Section(task=task, title=title_of(task), score=None, examples=examples)
        write_page(Page(title="Answers about clips", facts=(), sections=(section,)), work)
    return out / INDEX


def _plain(parsed: object) -> Any:
    """A parsed answer as JSON values; seconds as [start, end] spans."""
    if isinstance(parsed, avvp.AvvpEvents):
        return {
            stream: [[name, *span] for name, bits in grids.items() for span in runs_of(bits)]
            for stream, grids in (("visual", parsed.visual), ("audio", parsed.audio))
        }
    if isinstance(parsed, tuple):
        return [_plain(part) for part in parsed]
    return asdict(parsed) if is_dataclass(parsed) and not isinstance(parsed, type) else parsed


def _sample(
    url: str, task: str, instruction: str, features: Mapping[str, Any], question: str | None
) -> Sample:
    """The clip as the model is asked about it. Answer and label are not read when generating; the model of samples
    wants an answer, and the page reads from the label in which second a box lies."""
    label: dict[str, Any] = (
        {"second": int(question)} if get_task(task).needs == "box" and question else {}
    )
    return Sample(
        id=url,
        task=task,
        split="test",
        clip=url,
        instruction=instruction,
        answer="?",
        label=label,
        video=url if "video" in features else None,
        image=url if "image" in features else None,
        audio=url if features.keys() == {"audio"} else None,
    )
