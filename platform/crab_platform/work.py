"""What a preprocessing job is asked to do: files, streams, and the callables that decode and encode them.

Plain values that Ray ships to its workers. The records (sampling, decode, encoder) are identity and go into cache
keys; everything else says how and where.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from crab_platform.cache import FeatureCache
from crab_platform.holding import KEEP_S
from crab_platform.identity import RAW, AnyKey, DecodedKey, FeatureKey, canonical_json

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
    device: str = "cpu"
    """Where it is encoded; stands in what is stored, for rates and prices."""
    tolerance: float = 0.0
    """Relative L2 error that a recomputation may have; kept with every entry."""
    codec: str = RAW
    """How stored bytes are compressed; identity, as `dtype` is."""


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

    name: str
    """Of the job: stands in its leases."""
    by: str
    """Who runs it, for whoever wonders about a lease."""
    open_cache: Callable[[], FeatureCache]
    """Called in every worker; must be picklable."""
    streams: Mapping[str, StreamWork]
    """By name: a kind of stream may be sampled in several ways, each under a name of its own."""
    decode: Mapping[str, Any]
    """The decoder's record, part of every key."""
    make_decoder: Callable[[], Decoder]
    config: PipelineConfig = field(default_factory=PipelineConfig)
    keep_decoded_bytes: int = 0
    """Decoded windows of up to so many bytes are kept in the cache as well; 0 keeps none."""
    keep_s: float = KEEP_S
    """How long the manifest is kept when nobody pins it."""

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
            codec=work.codec,
        )

    def decoded_key(self, name: str, media_sha256: str) -> DecodedKey:
        """The key of what the encoder of one of `streams` is given."""
        work = self.streams[name]
        return DecodedKey(
            media_sha256=media_sha256,
            stream=work.stream,
            sampling=dict(work.sampling),
            decode=dict(self.decode),
        )

    def key_digests(self, name: str, media_sha256s: Sequence[str]) -> list[str]:
        """`key(name, sha).digest` of each file: of a million in seconds."""
        return _digests(self.key(name, _NO_MEDIA), media_sha256s)

    def decoded_digests(self, name: str, media_sha256s: Sequence[str]) -> list[str]:
        """`decoded_key(name, sha).digest` of each file."""
        return _digests(self.decoded_key(name, _NO_MEDIA), media_sha256s)


_NO_MEDIA = "0" * 64


def _digests(key: AnyKey, media_sha256s: Sequence[str]) -> list[str]:
    """The digests of keys that differ from `key` in their media only: the record is written once and cut there."""
    text = canonical_json(key.record())
    field = b'"media_sha256":"'
    at = text.index(field + _NO_MEDIA.encode()) + len(field)
    head = hashlib.sha256(text[:at])
    tail = text[at + 64 :]
    digests = []
    for sha256 in media_sha256s:
        hasher = head.copy()
        hasher.update(sha256.encode() + tail)
        digests.append(hasher.hexdigest())
    return digests
