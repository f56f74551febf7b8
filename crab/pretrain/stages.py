"""The stages as functions of the folders of the stages before them: what `crab run jobs/specs/pretrain-tiny.yaml` runs.

Every stage writes one new folder with all that later ones need of it, in float16 where the preset holds float16, so
that they learn from exactly the weights that will be used.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from crab.encoders.beats import Beats
from crab.encoders.clip import VisionFeatures
from crab.encoders.config import TINY_SELECT_LAYERS
from crab.encoders.frozen import AudioEncoder, VisionEncoder
from crab.encoders.load import load_encoder
from crab.encoders.tiny import (
    build_random,
    save_encoder,
    tiny_beats_config,
    tiny_clip_config,
)
from crab.model.build import build_model
from crab.model.collate import Collator, Example
from crab.model.config import AdapterConfig, tiny
from crab.model.crab_model import CrabModel
from crab.model.initial import PARTS, save_initial
from crab.model.llm import load_llm, load_tokenizer, tiny_llama, train_tokenizer
from crab.pretrain.audio import train_audio
from crab.pretrain.features import SceneFeatures, write_features
from crab.pretrain.fit import OnStep, Rates, scenes, split_matrices
from crab.pretrain.joint import MASK_TASKS, ExamplesOf, train_crab
from crab.pretrain.language import QUESTIONS, symbol_model, train_llm
from crab.pretrain.projectors import train_projector
from crab.pretrain.symbols import WORDS, audio_symbols, video_symbols
from crab.pretrain.vision import train_vision
from crab.samples import Sample
from crab.synth.questions import samples_of
from crab.synth.scene import Scene
from crab.train import seeded

LAYERS = (f"layer_{TINY_SELECT_LAYERS[0]}", f"layer_{TINY_SELECT_LAYERS[1]}")
"""Coarse and fine."""
_READERS = ("video_projector", "audio_projector")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is learnt from how much. See PretrainSpec in jobs/spec.py."""

    seed: int
    clips: int
    feature_clips: int
    vision_steps: int
    audio_steps: int
    llm_steps: int
    projector_steps: int
    mask_steps: int
    joint_steps: int
    batch_size: int


class Pretraining:
    """The stages over one folder; `stages` is their order. Each is a method (new folder, on_step)."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder, self.sizes = folder, sizes

    @property
    def stages(self) -> dict[str, tuple[Callable[[Path, OnStep], None], int]]:
        """Name -> what does it, and how many steps it reports."""
        s = self.sizes
        return {
            "clip": (self.clip, s.vision_steps),
            "beats": (self.beats, s.audio_steps),
            "language": (self.language, s.llm_steps),
            "features": (self.features, min(s.feature_clips, s.clips)),
            "projectors": (self.projectors, 2 * s.projector_steps),
            "masks": (self.masks, s.mask_steps),
            "joint": (self.joint, s.joint_steps),
        }

    @cached_property
    def pool(self) -> list[Scene]:
        return scenes(self.sizes.seed, self.sizes.clips)

    @property
    def seen(self) -> list[Scene]:
        """The scenes that have features."""
        return self.pool[: self.sizes.feature_clips]

    def clip(self, out: Path, on_step: OnStep) -> None:
        model = build_random(tiny_clip_config(), self.sizes.seed)
        assert isinstance(model, VisionFeatures)
        train_vision(
            model,
            self.pool,
            steps=self.sizes.vision_steps,
            batch=32,
            seed=self.sizes.seed,
            on_step=on_step,
        )
        save_encoder(model, out, dtype=torch.float16)

    def beats(self, out: Path, on_step: OnStep) -> None:
        model = build_random(tiny_beats_config(), self.sizes.seed)
        assert isinstance(model, Beats)
        train_audio(
            model,
            self.pool,
            steps=self.sizes.audio_steps,
            batch=80,
            seed=self.sizes.seed,
            on_step=on_step,
        )
        save_encoder(model, out, dtype=torch.float16)

    def language(self, out: Path, on_step: OnStep) -> None:
        tokenizer = train_tokenizer(texts(self.pool[:3000]))
        # One token a class, so that a name can be looked up in the slots as it stands.
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS[1:]])
        llm = tiny_llama(len(tokenizer), seed=self.sizes.seed)
        model = train_llm(
            llm,
            tokenizer,
            self.pool,
            steps=self.sizes.llm_steps,
            batch=self.sizes.batch_size,
            seed=self.sizes.seed,
            on_step=on_step,
        )
        llm.save_pretrained(out)
        tokenizer.save_pretrained(out)
        rest = {n: t for n, t in model.state_dict().items() if not n.startswith("llm.")}
        save_file(rest, out / "symbols.safetensors")

    def features(self, out: Path, on_step: OnStep) -> None:
        video = load_encoder(
            {"kind": "clip", "path": str(self.folder / "clip"), "select_layers": TINY_SELECT_LAYERS}
        )
        audio = load_encoder({"kind": "beats", "path": str(self.folder / "beats")})
        assert isinstance(video, VisionEncoder)
        assert isinstance(audio, AudioEncoder)
        write_features(out, self.seen, video, audio, seed=self.sizes.seed, on_step=on_step)

    def projectors(self, out: Path, on_step: OnStep) -> None:
        symbols, _ = self._symbol_model()
        crab = self._crab(*self._language())
        found = SceneFeatures(self.folder / "features", LAYERS)
        steps = self.sizes.projector_steps
        for number, (stream, array, made) in enumerate(
            (("audio", "tokens", audio_symbols), ("video", "fine", video_symbols))
        ):
            train_projector(
                getattr(crab, f"{stream}_projector"),
                getattr(symbols, f"{stream}_projector"),
                found.arrays[array],
                np.stack([made(scene) for scene in self.seen]).astype(np.float16),
                steps=steps,
                batch=64,
                seed=self.sizes.seed,
                on_step=_after(number * steps, on_step, f"{stream}/"),
            )
        save_file(_parts(crab, _READERS), out / "projectors.safetensors")

    def masks(self, out: Path, on_step: OnStep) -> None:
        """The mask decoder on real features, prompted by the LLM of the symbols, which stays as it is."""
        model, collate = self._symbol_model(draws=True)
        assert model.mask_decoder is not None
        found = SceneFeatures(self.folder / "features", LAYERS)

        def examples(number: int, samples: Sequence[Sample]) -> list[Example]:
            scene = self.seen[number]
            video = {"symbols": video_symbols(scene)}
            audio = {"symbols": audio_symbols(scene)}
            return [
                Example(
                    sample=e.sample,
                    features={"video": {**e.features["video"], **video}, "audio": audio},
                )
                for e in found.examples(number, samples)
            ]

        matrices, others = split_matrices(model.mask_decoder)
        self._train(
            model,
            collate,
            examples,
            {2e-3: others},
            {5e-3: matrices},
            steps=self.sizes.mask_steps,
            batch=8,
            count=3,
            tasks=MASK_TASKS,
            on_step=on_step,
        )
        save_file(_parts(model, ("mask_decoder",)), out / "masks.safetensors")

    def joint(self, out: Path, on_step: OnStep) -> None:
        """Everything on real features. Leaves `llm` and `initial` as the preset holds them."""
        llm, tokenizer = self._language()
        crab = self._crab(llm, tokenizer)
        state = {
            name: tensor
            for file, parts in (
                ("language/symbols", ("new_embedding", "new_head", "time_embedding")),
                ("projectors/projectors", _READERS),
                ("masks/masks", ("mask_decoder",)),
            )
            for name, tensor in load_file(self.folder / f"{file}.safetensors").items()
            if name.startswith(parts)
        }
        crab.load_state_dict(state, strict=False)
        crab.requires_grad_(True)
        found = SceneFeatures(self.folder / "features", LAYERS)
        matrices, others = split_matrices(crab)
        in_llm = {id(p) for p in llm.parameters()}
        self._train(
            crab,
            Collator(crab.config, tokenizer, crab.table),
            found.examples,
            {5e-4: others},
            {
                1e-3: [p for p in matrices if id(p) in in_llm],
                5e-4: [p for p in matrices if id(p) not in in_llm],
            },
            steps=self.sizes.joint_steps,
            batch=self.sizes.batch_size,
            count=1,
            tasks=None,
            on_step=on_step,
        )
        save_initial(_parts(crab, PARTS), out / "initial", dtype=torch.float16)
        nn.Module.half(llm)
        llm.save_pretrained(out / "llm")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(self.folder / "language" / name, out / "llm" / name)

    def _train(
        self,
        model: CrabModel,
        collate: Collator,
        examples_of: ExamplesOf,
        parameters: Rates,
        matrices: Rates,
        *,
        steps: int,
        batch: int,
        count: int,
        tasks: Collection[str] | None,
        on_step: OnStep,
    ) -> None:
        train_crab(
            model,
            collate,
            self.seen,
            examples_of,
            parameters=parameters,
            matrices=matrices,
            steps=steps,
            batch=batch,
            count=count,
            seed=self.sizes.seed,
            on_step=on_step,
            tasks=tasks,
        )

    def _language(self) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
        folder = str(self.folder / "language")
        llm = load_llm(folder)
        assert isinstance(llm, LlamaForCausalLM)
        return llm, load_tokenizer(folder)

    def _symbol_model(self, *, draws: bool = False) -> tuple[CrabModel, Collator]:
        """The model that the stage `language` left behind."""
        with seeded(self.sizes.seed):
            model, collate = symbol_model(*self._language(), self.sizes.seed, draws=draws)
        model.load_state_dict(
            load_file(self.folder / "language" / "symbols.safetensors"), strict=False
        )
        return model, collate

    def _crab(self, llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> CrabModel:
        """The tiny Crab without an adapter; everything but the LLM is random."""
        config = tiny("made here", video_layer=LAYERS[-1], mask_layers=LAYERS)
        config = config.model_copy(update={"adapter": AdapterConfig(method="none")})
        return build_model(config, tokenizer, llm)


def write_preset(folder: Path, out: Path) -> None:
    """The folder that crab/presets/tiny is a copy of, from finished stages."""
    for source, name in (
        ("clip", "clip"),
        ("beats", "beats"),
        ("joint/llm", "llm"),
        ("joint/initial", "initial"),
    ):
        shutil.copytree(folder / source, out / name)


def texts(pool: Sequence[Scene]) -> list[str]:
    """Everything that the tokenizer should write in few pieces."""
    samples = [sample for scene in pool for sample in samples_of(scene, QUESTIONS)]
    parts = [part for s in samples for part in (s.instruction, f"{s.reasoning} {s.answer}")]
    return parts + ["This is a video:\nThis is an audio:\n"] * 100 + list(WORDS) * 10


def _parts(model: CrabModel, parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n.startswith(parts)}


def _after(start: int, on_step: OnStep, prefix: str) -> OnStep:
    """Steps of a second training in one stage, counted on from the first."""
    return lambda step, values: on_step(
        start + step, {f"{prefix}{name}": value for name, value in values.items()}
    )
