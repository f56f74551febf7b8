"""What a preprocessing job is asked to do: files, streams, and the callables that decode and encode them.

Plain values that Ray ships to its workers. The records (sampling, decode, encoder) are identity and go into cache
keys; everything else says how and where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from crab_platform.identity import FeatureKey

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A media file and what is wanted of it."""

    name: str
    """Its name in the manifest: the same wherever the file lies."""
    url: str
    streams: tuple[str, ...]
    """Names in `Work.streams`."""
    aliases: tuple[str, ...] = ()
    """Other names of the same file: the manifest has its rows under each."""


@dataclass(frozen=True, kw_only=True)
class Undecoded:
    """Why a stream of a file could not be decoded."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class DecodeTask:
    """One file on this machine and the streams that are wanted; the requests are the decoder's own objects."""

    path: str
    requests: Mapping[str, Any]


class Decoder(Protocol):
    """Decodes one file within limits of its own; never raises for a bad file. Called from several threads."""

    def __call__(self, task: DecodeTask) -> Mapping[str, Array | Undecoded]:
        """Stream name -> array with a leading axis of frames or segments, or why there is none."""
        ...


Encode = Callable[[Array], dict[str, Array]]


@dataclass(frozen=True, kw_only=True)
class StreamWork:
    """What is done with one stream. The records are identity; the callables are how."""

    stream: str
    """The kind of stream, as it stands in keys: "video", "audio", "image"."""
    sampling: Mapping[str, Any]
    encoder: Mapping[str, Any]
    dtype: str
    request: Any
    make_encoder: Callable[[], Encode]
    """Called once in every encode actor; must be picklable."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How the work is placed. Nothing here is in a key."""

    mode: Literal["fused", "split"] = "fused"
    encode_actors: int = 1
    decode_tasks: int = 1
    """Decode tasks at once in split mode."""
    encode_cpus: float = 1
    encode_gpus: float = 0
    clips_per_pack: int = 64
    """Clips that one encode task takes: what a killed task loses, and what lies in memory decoded at once."""
    clips_per_decode: int = 8
    """Clips that one decode task takes in split mode."""
    decode_processes: int = 1
    """Clips that one worker decodes at once."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One preprocessing job."""

    cache_url: str
    streams: Mapping[str, StreamWork]
    """By name: a kind of stream may be sampled in several ways, each under a name of its own."""
    decode: Mapping[str, Any]
    """The decoder's record, part of every key."""
    make_decoder: Callable[[], Decoder]
    config: PipelineConfig = field(default_factory=PipelineConfig)

    def key(self, name: str, media_sha256: str) -> FeatureKey:
        """The cache key of one of `streams` for a file."""
        work = self.streams[name]
        return FeatureKey(
            media_sha256=media_sha256,
            stream=work.stream,
            sampling=dict(work.sampling),
            decode=dict(self.decode),
            encoder=dict(work.encoder),
            dtype=work.dtype,
        )
