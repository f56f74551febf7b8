"""Commits: small parquet files that make the entries of a pack exist.

A row says that a key's features lie at these bytes of that pack; an entry without a row does not
exist, whatever lies in the packs. Rows also remember which URL, at which size and mtime or ETag,
had which SHA-256, so that the next run need not hash the media again; which run of which team
made the entry, what it cost, and how far a recomputation may be from it.

Parquet can carry more than columns: pyarrow restores types from schema metadata, and Ray Data once
unpickled it. Commits are written without that metadata, and read as plain columns whose types must
be exactly ours. Pages have checksums.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crab_platform.clock import SYSTEM
from crab_platform.identity import canonical_json
from crab_platform.packs import Entry, NewEntry, TensorSpec

COMMIT_SCHEMA = 2
"""Version of the columns. A reader skips what is newer and says so; it reads every older one."""

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
        ("run", pa.string()),
        ("experiment", pa.string()),
        ("team", pa.string()),
        ("decode_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("device", pa.string()),
        ("tolerance", pa.float64()),
    ]
)
SINCE_2 = ("run", "experiment", "team", "decode_s", "encode_s", "device", "tolerance")
"""Columns that schema 1 did not have; there they are empty and 0."""
INDEXED = (*COLUMNS.names[1:7], *COLUMNS.names[8:11], "decode_s", "encode_s")
"""The columns that an index needs: of schema 1 all but `schema` and `record`, and what an entry cost."""
_PACK_PATH = re.compile(rf"{PACKS}/[0-9a-f]{{2}}/[0-9a-f]{{16}}-[0-9a-f]{{16}}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who commits: stands in every row, for `crab cache stat`, `why` and lineage. Never part of a key."""

    run: str = ""
    experiment: str = ""
    team: str = ""


new_id = SYSTEM.new_id


NOBODY = Writer()


class UnusableCommit(Exception):  # noqa: N818 (a reason to skip, not a failure)
    """A commit file that this version does not use; `reason` is a word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def pack_path(identifier: str) -> str:
    """Where a pack lies. Spread over 256 folders: stores limit requests per prefix."""
    return f"{PACKS}/{identifier[-2:]}/{identifier}.safetensors"


def pack_id(path: str) -> str | None:
    """The identifier in a pack's path, None for any other file."""
    return path[len(PACKS) + 4 : -len(".safetensors")] if _PACK_PATH.fullmatch(path) else None


def are_packs(paths: Sequence[object]) -> bool:
    """Whether all of these are paths of packs."""
    return all(isinstance(path, str) and _PACK_PATH.fullmatch(path) for path in paths)


def id_time_ns(identifier: str) -> int:
    """When an identifier was made, in nanoseconds of its maker's clock."""
    return int(identifier[:16], 16)


def write_commit(rows: Sequence[tuple[NewEntry, Entry]], writer: Writer) -> bytes:
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
        "run": [writer.run] * len(rows),
        "experiment": [writer.experiment] * len(rows),
        "team": [writer.team] * len(rows),
        "decode_s": [new.decode_s for new, _ in rows],
        "encode_s": [new.encode_s for new, _ in rows],
        "device": [new.device for new, _ in rows],
        "tolerance": [new.tolerance for new, _ in rows],
    }
    return table_to_parquet(pa.table(columns, schema=COLUMNS))


def read_commit(data: bytes, columns: Sequence[str] = INDEXED) -> Any:
    """The given columns of a commit as a pyarrow table.

    Raises UnusableCommit with reason `schema_newer` or `commit_unreadable`.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        version = _version(file)
        stored = [column for column in COLUMNS if version > 1 or column.name not in SINCE_2]
        found = file.schema_arrow
        for column in stored:
            if column.name not in found.names or found.field(column.name).type != column.type:
                raise UnusableCommit(
                    "commit_unreadable", f"column {column.name} is not {column.type}"
                )
        wanted = [column.name for column in stored if column.name in {*columns, "pack"}]
        table = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:  # ArrowInvalid, and OSError for bad checksums
        raise UnusableCommit("commit_unreadable", str(error)) from error
    packs = table.column("pack").unique().to_pylist()
    if not are_packs(packs):
        raise UnusableCommit("commit_unreadable", f"one of {packs[:3]} is not the path of a pack")
    if any(table.column(name).null_count for name in wanted):
        raise UnusableCommit("commit_unreadable", "a column has empty cells")
    for column in COLUMNS:
        if column.name in columns and column.name not in wanted:
            empty = "" if column.type == pa.string() else 0.0
            table = table.append_column(column, pa.array([empty] * table.num_rows, column.type))
    return table.select(list(columns))


def _version(file: Any) -> int:
    """The schema of a commit; every row must say the same."""
    found = file.schema_arrow
    if "schema" not in found.names or found.field("schema").type != pa.int32():
        raise UnusableCommit("commit_unreadable", "no column `schema` of 32-bit integers")
    versions = set(file.read(columns=["schema"]).column("schema").to_pylist())
    newest = max((version for version in versions if version is not None), default=0)
    if newest > COMMIT_SCHEMA:
        raise UnusableCommit(
            "schema_newer", f"written as schema {newest}, this version reads {COMMIT_SCHEMA}"
        )
    if len(versions) != 1 or newest < 1:
        raise UnusableCommit("commit_unreadable", f"schema versions {sorted(map(str, versions))}")
    return int(newest)


def table_to_parquet(table: Any) -> bytes:
    """A pyarrow table as parquet: checksums on pages, no pyarrow schema metadata."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", store_schema=False, write_page_checksum=True)
    return sink.getvalue()


@lru_cache(maxsize=4096)  # as specs_from_json
def specs_to_json(specs: tuple[TensorSpec, ...]) -> str:
    """Tensor specs as compact JSON: [[name, dtype, shape, offset], ...], and in a compressed tensor's
    also codec and stored bytes."""
    return canonical_json(
        [
            [s.name, s.dtype, list(s.shape), s.offset]
            + ([] if s.stored_bytes is None else [s.codec, s.stored_bytes])
            for s in specs
        ]
    ).decode()


@lru_cache(maxsize=4096)  # most entries of a cache have the same few shapes
def specs_from_json(text: str) -> tuple[TensorSpec, ...]:
    """Back from `specs_to_json`. Raises ValueError for anything else."""
    try:
        return tuple(
            TensorSpec(
                name=str(name),
                dtype=str(dtype),
                shape=tuple(map(int, shape)),
                offset=int(offset),
                **_compression(rest),
            )
            for name, dtype, shape, offset, *rest in json.loads(text)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor list {text[:200]!r} is not of the form [[name, ...]]") from error


def _compression(rest: Sequence[Any]) -> dict[str, Any]:
    if not rest:
        return {}
    codec, stored_bytes = rest
    return {"codec": str(codec), "stored_bytes": int(stored_bytes)}
