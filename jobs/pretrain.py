"""Makes the tiny preset: `crab run jobs/specs/pretrain-tiny.yaml`. One process, no cache, minutes to an hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from crab import pretrain
from crab.encoders.beats import Beats
from crab.encoders.clip import VisionFeatures
from crab.encoders.tiny import build_random, save_encoder, tiny_beats_config, tiny_clip_config
from crab.model.llm import tiny_llama, train_tokenizer
from crab.synth.questions import samples_of
from crab.synth.scene import Scene
from crab_platform import tracking
from jobs.output import progress, write_result
from jobs.spec import PretrainSpec, SpecError, spec_record


def run(spec: PretrainSpec) -> dict[str, Any]:
    """Trains encoders, tokenizer and LLM on scenes that are rendered in memory, and writes them to `out`."""
    out = Path(spec.out)
    for name in ("clip", "beats", "llm"):
        if (out / name).exists():
            raise SpecError(f"{out / name} exists; give another `out`, or remove it first")
    scenes = pretrain.scenes(spec.seed, spec.clips)
    metrics: dict[str, float] = {}
    with tracking.start_run(
        spec.tracking.uri, spec.tracking.experiment, spec.name, spec=spec_record(spec)
    ) as run_:

        def part(name: str, steps: int, train: Any, **options: Any) -> None:
            with progress(f"{name} steps", steps) as bar:

                def on_step(step: int, values: dict[str, float]) -> None:
                    bar(step, steps)
                    metrics.update({f"{name}/{key}": value for key, value in values.items()})
                    if step % 20 == 0 or step == steps:
                        run_.metrics({f"{name}/{key}": v for key, v in values.items()}, step)

                train(steps=steps, seed=spec.seed, on_step=on_step, **options)

        vision = build_random(tiny_clip_config(), spec.seed)
        hearing = build_random(tiny_beats_config(), spec.seed)
        assert isinstance(vision, VisionFeatures)
        assert isinstance(hearing, Beats)
        part(
            "clip",
            spec.vision_steps,
            lambda **o: pretrain.train_vision(vision, scenes, batch=2 * spec.batch_size, **o),
        )
        save_encoder(vision, out / "clip", dtype=torch.float16)
        part(
            "beats",
            spec.audio_steps,
            lambda **o: pretrain.train_audio(hearing, scenes, batch=80, **o),
        )
        save_encoder(hearing, out / "beats", dtype=torch.float16)
        tokenizer = train_tokenizer(_texts(scenes))
        llm = tiny_llama(len(tokenizer), seed=spec.seed)
        part(
            "llm",
            spec.llm_steps,
            lambda **o: pretrain.train_llm(llm, tokenizer, scenes, batch=spec.batch_size, **o),
        )
        torch.nn.Module.half(llm)
        llm.save_pretrained(out / "llm")
        tokenizer.save_pretrained(out / "llm")
        result = {"job": spec.job, "name": spec.name, "out": str(out), "metrics": metrics}
        write_result(spec.folder, result)
    return result


def _texts(scenes: list[Scene]) -> list[str]:
    """Everything that the tokenizer should write in few pieces."""
    samples = [sample for scene in scenes for sample in samples_of(scene)]
    texts = [part for s in samples for part in (s.instruction, f"{s.reasoning} {s.answer}")]
    return texts + ["This is a video:\nThis is an audio:\n"] * 100 + pretrain.video_symbols() * 10
