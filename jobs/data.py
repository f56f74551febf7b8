"""Data sets of a spec: their samples, and the media files that they name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crab.datasets.examples import Example, read_examples, read_labelled
from crab.samples import Sample, read_samples
from crab_platform.work import Source
from jobs.spec import DataSource, SpecError

_VIDEO = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".ts", ".flv", ".mpg", ".mpeg"}
_AUDIO = {".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus"}
_IMAGE = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """One stream of one file, as a sample needs it."""

    source: str
    """Name of the file in the manifest."""
    stream: str
    """Stream and, where a task is sampled in its own way, the way: "audio", "audio:music-avqa"."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    name: str
    samples: tuple[Sample, ...]
    media: dict[str, tuple[MediaRef, ...]]
    """Sample id -> what it needs."""
    sources: tuple[Source, ...]
    without_label: dict[str, str] = field(default_factory=dict)
    """Id -> why something that is asked in the data is no sample."""


def stream_name(stream: str, task: str, special: Mapping[str, str]) -> str:
    """The name under which a task's stream is cached; the audio of some tasks is cut in another way."""
    way = special.get(task)
    return f"audio:{way}" if stream == "audio" and way else stream


def load_dataset(source: DataSource, special: Mapping[str, str]) -> Dataset:
    """Reads a data source; `special` names the tasks whose audio is sampled in another way.

    Raises SpecError when it is not there, ValueError with file:line for a bad line.
    """
    if source.samples is not None:
        return _from_samples(source.name, source.samples, special)
    assert source.files is not None
    folder = Path(source.files)
    if not folder.is_dir():
        raise SpecError(f"data {source.name!r}: {source.files} is not a folder")
    files = sorted(
        (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")),
        key=lambda path: path.parts,
    )
    sources = [
        Source(
            name=f"{source.name}/{path.relative_to(folder).as_posix()}",
            url=os.path.abspath(path),
            streams=_streams_of(path),
        )
        for path in files
    ]
    return Dataset(name=source.name, samples=(), media={}, sources=tuple(sources))


def merge_sources(sources: Iterable[Source]) -> list[Source]:
    """One source a file: a file in several data sets is decoded once, with all streams, and stands under each name."""
    by_url: dict[str, Source] = {}
    for source in sources:
        known = by_url.get(source.url)
        if known is not None:
            names = dict.fromkeys((known.name, *known.aliases, source.name))
            source = Source(
                name=known.name,
                url=known.url,
                streams=tuple(dict.fromkeys(known.streams + source.streams)),
                aliases=tuple(names)[1:],
            )
        by_url[source.url] = source
    return list(by_url.values())


def samples_digest(samples: Iterable[Sample]) -> str:
    """What samples say: another question, answer or label is another data set, over the same clips too."""
    content = hashlib.sha256()
    for sample in samples:
        content.update(sample.model_dump_json().encode() + b"\n")
    return content.hexdigest()


def _from_samples(name: str, path: str, special: Mapping[str, str]) -> Dataset:
    items: Sequence[Sample | Example]
    reasons: dict[str, str] = {}
    try:
        if path.endswith(".json"):
            items = read_examples(path)
            samples, reasons = read_labelled(path)
        else:
            items = samples = read_samples(path)
    except FileNotFoundError as error:
        raise SpecError(
            f"data {name!r}: there is no {path}; `crab synth {os.path.dirname(path) or '.'} --clips 200` makes "
            "AV-Shapes, `crab import` makes samples of a data set"
        ) from error
    folder = os.path.dirname(path if "://" in path else os.path.abspath(path))
    media: dict[str, tuple[MediaRef, ...]] = {}
    wanted: dict[str, dict[str, None]] = {}
    for item in items:
        refs = []
        for url, stream in item.media():
            cached_as = stream_name(stream, item.task, special)
            wanted.setdefault(url, {})[cached_as] = None
            refs.append(MediaRef(source=_name(name, folder, url), stream=cached_as))
        media[item.id] = tuple(refs)
    sources = [
        Source(name=_name(name, folder, url), url=url, streams=tuple(streams))
        for url, streams in wanted.items()
    ]
    return Dataset(
        name=name,
        samples=tuple(samples),
        media=media,
        sources=tuple(sources),
        without_label=reasons,
    )


def _name(dataset: str, folder: str, url: str) -> str:
    """Relative to the samples file where possible: the same name wherever the data set lies."""
    root = folder.rstrip("/") + "/"
    inside = url.removeprefix(root) if url.startswith(root) else url.replace("://", "/").lstrip("/")
    return f"{dataset}/{inside}"


def _streams_of(path: Path) -> tuple[str, ...]:
    kind = path.suffix.lower()
    if kind in _AUDIO:
        return ("audio",)
    if kind in _IMAGE:
        return ("image",)
    # A file of any other kind is tried as a video; what is no media is set aside with its reason.
    return ("video", "audio") if kind in _VIDEO else ("video",)
