"""Commits: small parquet files that make the entries of a pack exist.

A row says that a key's features lie at these bytes of that pack; an entry without a row does not
exist, whatever lies in the packs. Rows also remember which URL, at which size and mtime or ETag,
had which SHA-256, so that the next run need not hash the media again.

Parquet can carry more than columns: pyarrow restores types from schema metadata, and Ray Data once
unpickled it. Commits are written without that metadata, and read as plain columns whose types must
be exactly ours. Pages have checksums.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crab_platform.identity import canonical_json
from crab_platform.packs import Entry, NewEntry, TensorSpec

COMMIT_SCHEMA = 1
"""Version of the columns. A reader skips what is newer and says so."""

COMMITS = "commits"
PACKS = "packs"

COLUMNS = pa.schema(
    [
        ("schema", pa.int32()),
        ("key", pa.string()),
        ("pack", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("blake3", pa.string()),
        ("tensors", pa.string()),
        ("record", pa.string()),
        ("source_url", pa.string()),
        ("source_version", pa.string()),
        ("media_sha256", pa.string()),
    ]
)
_LOADED = [name for name in COLUMNS.names if name not in ("schema", "record")]
_COMMIT_PATH = re.compile(rf"{COMMITS}/([0-9a-f]{{16}}-[0-9a-f]{{16}})\.parquet")
_PACK_PATH = re.compile(rf"{PACKS}/[0-9a-f]{{2}}/[0-9a-f]{{16}}-[0-9a-f]{{16}}\.safetensors")


class UnusableCommit(Exception):  # noqa: N818 (a reason to skip, not a failure)
    """A commit file that this version does not use; `reason` is a word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def new_id() -> str:
    """A name nobody else picks, and which sorts by time: nanoseconds, then 64 random bits."""
    return f"{time.time_ns():016x}-{secrets.token_hex(8)}"


def pack_path(identifier: str) -> str:
    """Where a pack lies. Spread over 256 folders: stores limit requests per prefix."""
    return f"{PACKS}/{identifier[-2:]}/{identifier}.safetensors"


def commit_path(identifier: str) -> str:
    """Where a commit lies. One folder, since all of them are listed at once."""
    return f"{COMMITS}/{identifier}.parquet"


def commit_id(path: str) -> str | None:
    """The identifier in a commit's path, None for any other file."""
    found = _COMMIT_PATH.fullmatch(path)
    return found.group(1) if found else None


def write_commit(rows: Sequence[tuple[NewEntry, Entry]]) -> bytes:
    """The bytes of a commit file. A key may stand in several rows, one for each source it has."""
    columns: dict[str, list[Any]] = {
        "schema": [COMMIT_SCHEMA] * len(rows),
        "key": [entry.key for _, entry in rows],
        "pack": [entry.pack for _, entry in rows],
        "offset": [entry.offset for _, entry in rows],
        "length": [entry.length for _, entry in rows],
        "blake3": [entry.blake3 for _, entry in rows],
        "tensors": [specs_to_json(entry.tensors) for _, entry in rows],
        "record": [canonical_json(new.record).decode() for new, _ in rows],
        "source_url": [new.source_url for new, _ in rows],
        "source_version": [new.source_version for new, _ in rows],
        "media_sha256": [str(new.record["media_sha256"]) for new, _ in rows],
    }
    return table_to_parquet(pa.table(columns, schema=COLUMNS))


def read_commit(data: bytes) -> Any:
    """The columns of a commit as a pyarrow table, without `schema` and `record`.

    Raises UnusableCommit with reason `schema_newer` or `commit_unreadable`.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        found = file.schema_arrow
        if "schema" not in found.names or found.field("schema").type != pa.int32():
            raise UnusableCommit("commit_unreadable", "no column `schema` of 32-bit integers")
        versions = set(file.read(columns=["schema"]).column("schema").to_pylist())
        newest = max((version for version in versions if version is not None), default=0)
        if newest > COMMIT_SCHEMA:
            raise UnusableCommit(
                "schema_newer", f"written as schema {newest}, this version reads {COMMIT_SCHEMA}"
            )
        if versions != {COMMIT_SCHEMA}:
            raise UnusableCommit(
                "commit_unreadable", f"schema versions {sorted(map(str, versions))}"
            )
        for column in COLUMNS:
            if column.name not in found.names or found.field(column.name).type != column.type:
                raise UnusableCommit(
                    "commit_unreadable", f"column {column.name} is not {column.type}"
                )
        table = file.read(columns=_LOADED)
    except (pa.ArrowException, OSError) as error:  # ArrowInvalid, and OSError for bad checksums
        raise UnusableCommit("commit_unreadable", str(error)) from error
    for pack in table.column("pack").unique().to_pylist():
        if not isinstance(pack, str) or not _PACK_PATH.fullmatch(pack):
            raise UnusableCommit("commit_unreadable", f"{pack!r} is not the path of a pack")
    if any(table.column(name).null_count for name in _LOADED):
        raise UnusableCommit("commit_unreadable", "a column has empty cells")
    return table.select(_LOADED)


def table_to_parquet(table: Any) -> bytes:
    """A pyarrow table as parquet: checksums on pages, no pyarrow schema metadata."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False, write_page_checksum=True)
    return sink.getvalue()


def specs_to_json(specs: Sequence[TensorSpec]) -> str:
    """Tensor specs as compact JSON: [[name, dtype, shape, offset], ...]."""
    return canonical_json([[s.name, s.dtype, list(s.shape), s.offset] for s in specs]).decode()


@lru_cache(maxsize=4096)  # most entries of a cache have the same few shapes
def specs_from_json(text: str) -> tuple[TensorSpec, ...]:
    """Back from `specs_to_json`. Raises ValueError for anything else."""
    try:
        return tuple(
            TensorSpec(
                name=str(name), dtype=str(dtype), shape=tuple(map(int, shape)), offset=int(offset)
            )
            for name, dtype, shape, offset in json.loads(text)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor list {text[:200]!r} is not of the form [[name, ...]]") from error
