"""One adapter, any clips: decode, encode, answer. Nothing is cached and no Ray is started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from crab.encoders import AudioEncoder, Encoder, VisionEncoder, load_encoder
from crab.evaluate import get_task
from crab.media import DecodePool, DecodeRequest, Failure
from crab.model.collate import Example
from crab.predict import predict
from crab.samples import Sample
from crab.tasks import ave, avqa, avvp
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
    encoders: Encoders | None = None,
    sampling: Sampling | None = None,
    runs: str = "work/runs",
    max_new_tokens: int = 160,
) -> list[dict[str, Any]]:
    """What the adapter says about each clip: {"media", "task", "text", "answer", "without"} or {"media", "problem"}.

    `without` names streams that the clip does not have; `answer` is the parsed answer, None where the text is not of
    the task's grammar. Raises ValueError for an unknown task, an AVQA request without a question, or an adapter that is
    none.
    """
    get_task(task)
    instruction = _instruction(task, question)
    sampling = sampling or Sampling()
    video, audio = (load_encoder(config) for config in encoder_configs(encoders or Encoders()))
    if not isinstance(video, VisionEncoder) or not isinstance(audio, AudioEncoder):
        raise SpecError("encoders: video needs an encoder of kind clip, audio one of kind beats")
    model, collate = load_adapter(find_adapter(str(adapter), os.path.abspath(runs)))
    layers = {"video": model.config.video.layer, "audio": model.config.audio.layer}
    encoders_of: dict[str, Encoder] = {"video": video, "audio": audio}
    requests = [
        DecodeRequest(source=url, video=sampling.video(video.image_size), audio=sampling.audio())
        for url in media
    ]
    answers: list[dict[str, Any]] = []
    with DecodePool(num_workers=1) as pool:
        for url, result in zip(media, pool.decode(requests), strict=True):
            streams = {"video": result.decoded.video, "audio": result.decoded.audio}
            lost = [value for value in streams.values() if isinstance(value, Failure)]
            features = {
                name: {layers[name]: encoders_of[name].encode(value)[layers[name]]}
                for name, value in streams.items()
                if value is not None and not isinstance(value, Failure)
            }
            if not features or any(failure.reason not in _SILENT for failure in lost):
                answers.append({"media": url, "problem": f"{lost[0].reason}: {lost[0].detail}"})
                continue
            sample = _sample(url, task, instruction, features)
            (found,) = predict(
                model,
                collate,
                [Example(sample=sample, features=features)],
                max_new_tokens=max_new_tokens,
            )
            parsed = get_task(task).parse(found.text)
            without = sorted({"video", "audio"} - features.keys())
            answers.append(
                {
                    "media": url,
                    "task": task,
                    "text": found.text,
                    "answer": None if parsed is None else _plain(parsed),
                    "without": without,
                }
            )
    return answers


def _plain(parsed: object) -> Any:
    """A parsed answer as JSON values; seconds as [start, end] spans."""
    if isinstance(parsed, avvp.AvvpEvents):
        return {
            stream: [[name, *span] for name, bits in grids.items() for span in runs_of(bits)]
            for stream, grids in (("visual", parsed.visual), ("audio", parsed.audio))
        }
    return asdict(parsed) if is_dataclass(parsed) and not isinstance(parsed, type) else parsed


def _sample(url: str, task: str, instruction: str, features: dict[str, Any]) -> Sample:
    # The answer is not read when generating; the model of samples wants one.
    media = {"video": url} if "video" in features else {"audio": url}
    return Sample(
        id=url,
        task=task,
        split="test",
        clip=url,
        instruction=instruction,
        answer="?",
        label={},
        **media,
    )


def _instruction(task: str, question: str | None) -> str:
    if task == "avqa":
        if not question:
            raise SpecError('task avqa needs a question: --question "How many objects are heard?"')
        return avqa.instruction(question)
    if question:
        raise SpecError(f"task {task} asks its own question; leave out --question")
    fixed = {"ave": ave.INSTRUCTION, "avvp": avvp.INSTRUCTION}
    return fixed[task]
