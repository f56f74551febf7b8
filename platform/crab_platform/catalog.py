"""Manifests: exactly what a run uses, and the digest that is the data set's version.

A manifest says for every source and stream either where its features lie or why there are none.
Its digest covers what the data is (names, keys, digests of features, reasons), not where it lies:
the same features in a folder and in a bucket are the same version. It lies in the store beside the
packs, as `manifests/<digest>.parquet`, and like them is written once.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from crab_platform import commits
from crab_platform.identity import digest
from crab_platform.packs import Entry
from crab_platform.storage import AlreadyExists, Store

MANIFEST_SCHEMA = 1
MANIFESTS = "manifests"

COLUMNS = pa.schema(
    [
        ("schema", pa.int32()),
        ("source", pa.string()),
        ("stream", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("media_sha256", pa.string()),
        ("key", pa.string()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("blake3", pa.string()),
        ("tensors", pa.string()),
        ("commit", pa.string()),
        ("layer", pa.string()),
    ]
)
_LATER = ("layer",)
"""Columns that manifests of the first version do not have; empty there."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class CorruptManifest(Exception):  # noqa: N818 (as CorruptEntry)
    """A stored manifest is not what its name says, or was written by a newer version."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One stream of one source."""

    source: str
    """The clip's name in its data set: never a path or URL of this machine, since it is identity.
    """
    stream: str
    status: Literal["ready", "set_aside"]
    reason: str = ""
    """Why it was set aside: a word of a fixed vocabulary, kept by the pipeline."""
    detail: str = ""
    """The same for people. Not part of the digest: it may name places."""
    media_sha256: str = ""
    entry: Entry | None = None

    def __post_init__(self) -> None:
        if not self.source or self.source.startswith("/") or "://" in self.source:
            raise ValueError(
                f"source {self.source!r} is empty or a place; expected the clip's name in its data "
                "set, the same wherever the data lies"
            )
        if self.status == "ready" and (self.entry is None or self.reason):
            raise ValueError(f"{self.source}/{self.stream} is ready: it needs an entry, no reason")
        if self.status == "set_aside" and (self.entry is not None or not self.reason):
            raise ValueError(f"{self.source}/{self.stream} is set aside: it needs only a reason")
        if self.status not in ("ready", "set_aside"):
            raise ValueError(f"status {self.status!r}; expected 'ready' or 'set_aside'")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a run uses. Rows are sorted by source and stream, each pair once."""

    digest: str
    rows: tuple[ManifestRow, ...]

    @property
    def path(self) -> str:
        """Where it lies in its store."""
        return manifest_path(self.digest)

    def ready(self) -> list[ManifestRow]:
        """Rows that have features."""
        return [row for row in self.rows if row.status == "ready"]

    def set_aside(self) -> list[ManifestRow]:
        """Rows that have none, each with its reason."""
        return [row for row in self.rows if row.status == "set_aside"]

    def row(self, source: str, stream: str) -> ManifestRow:
        """The row of one stream of one source. Raises ValueError when the manifest has none."""
        try:
            return self._by_name[source, stream]
        except KeyError:
            streams = sorted(stream for name, stream in self._by_name if name == source)
            known = f"it has the streams {streams} of it" if streams else "it has no such source"
            raise ValueError(
                f"manifest {self.digest[:12]} has no {stream!r} of source {source!r}: {known}; "
                "preprocess the samples that you want to read"
            ) from None

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], ManifestRow]:
        return {(row.source, row.stream): row for row in self.rows}


def manifest_path(manifest_digest: str) -> str:
    """Where the manifest of that digest lies. Raises ValueError for anything but a digest."""
    if not _DIGEST.fullmatch(manifest_digest):
        raise ValueError(f"{manifest_digest!r} is not a manifest digest (64 lower-case hex digits)")
    return f"{MANIFESTS}/{manifest_digest}.parquet"


def build_manifest(rows: Iterable[ManifestRow]) -> Manifest:
    """Rows in order, with their digest. Raises ValueError when a source and stream stand twice."""
    ordered = sorted(rows, key=lambda row: (row.source, row.stream))
    for one, other in pairwise(ordered):
        if (one.source, one.stream) == (other.source, other.stream):
            raise ValueError(f"two rows for stream {one.stream!r} of source {one.source!r}")
    return Manifest(digest=_content_digest(ordered), rows=tuple(ordered))


def write_manifest(store: Store, rows: Iterable[ManifestRow]) -> Manifest:
    """Write the manifest of these rows and return it.

    When one of the same digest is there, it stays and is returned: it holds the same data, perhaps
    with features at other places.
    """
    return put_manifest(store, build_manifest(rows))


def put_manifest(store: Store, manifest: Manifest) -> Manifest:
    """As `write_manifest`, of one that is built."""
    try:
        store.create(manifest.path, commits.table_to_parquet(_to_table(manifest.rows)))
    except AlreadyExists:
        return read_manifest(store, manifest.digest)
    return manifest


def read_manifest(store: Store, manifest_digest: str) -> Manifest:
    """The manifest of that digest.

    Raises FileNotFoundError when the store has none, CorruptManifest when the file does not have
    the content that its name promises.
    """
    path = manifest_path(manifest_digest)
    data = store.read(path)
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        found = file.schema_arrow
        wrong = [
            column.name
            for column in COLUMNS
            if (column.name not in found.names and column.name not in _LATER)
            or (column.name in found.names and found.field(column.name).type != column.type)
        ]
        if wrong:
            raise CorruptManifest(
                f"{store.url}/{path}: columns {wrong} are missing or of other types"
            )
        table = file.read(columns=[name for name in COLUMNS.names if name in found.names])
        for name in set(_LATER) - set(found.names):
            table = table.append_column(name, pa.array([""] * table.num_rows, pa.string()))
    except (pa.ArrowException, OSError) as error:
        raise CorruptManifest(f"{store.url}/{path} is not readable as parquet: {error}") from error
    versions = set(table.column("schema").to_pylist()) - {MANIFEST_SCHEMA}
    if versions:
        raise CorruptManifest(
            f"{store.url}/{path} has schema {versions}, this version reads {MANIFEST_SCHEMA}; "
            "use the version of crab-platform that wrote it, or preprocess again"
        )
    try:
        manifest = build_manifest(_to_row(row) for row in table.to_pylist())
    except (TypeError, ValueError) as error:
        raise CorruptManifest(f"{store.url}/{path}: {error}") from error
    if manifest.digest != manifest_digest:
        raise CorruptManifest(
            f"{store.url}/{path} holds the data of manifest {manifest.digest}; preprocess again"
        )
    return manifest


def _content_digest(rows: Sequence[ManifestRow]) -> str:
    content = [
        [
            row.source,
            row.stream,
            row.status,
            row.reason,
            row.entry.key if row.entry else "",
            row.entry.blake3 if row.entry else "",
        ]
        for row in rows
    ]
    return digest({"schema": MANIFEST_SCHEMA, "rows": content})


def _to_table(rows: Sequence[ManifestRow]) -> Any:
    entries = [row.entry for row in rows]
    columns: dict[str, list[Any]] = {"schema": [MANIFEST_SCHEMA] * len(rows)}
    for name in ("source", "stream", "status", "reason", "detail", "media_sha256"):
        columns[name] = [getattr(row, name) for row in rows]
    for name in ("key", "pack", "blake3", "commit", "layer"):
        columns[name] = [getattr(entry, name) if entry else "" for entry in entries]
    for name in ("offset", "length"):
        columns[name] = [getattr(entry, name) if entry else 0 for entry in entries]
    columns["tensors"] = [commits.specs_to_json(e.tensors) if e else "" for e in entries]
    return pa.table(columns, schema=COLUMNS)


def _to_row(cells: dict[str, Any]) -> ManifestRow:
    entry = None
    if cells["status"] == "ready":
        places = ("key", "pack", "offset", "length", "blake3", "commit", "layer")
        entry = Entry(
            **{name: cells[name] for name in places},
            tensors=commits.specs_from_json(cells["tensors"]),
        )
    names = ("source", "stream", "status", "reason", "detail", "media_sha256")
    return ManifestRow(**{name: cells[name] for name in names}, entry=entry)
