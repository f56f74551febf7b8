"""Entries copied as they are: out of another team's cache into one's own, or out of small packs into a large one.

A copy has the key, the digest and the history of the original (who computed it, at what cost); only
its place is new. What is damaged is not copied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from crab_platform import commits
from crab_platform.cache import Blob, FeatureCache
from crab_platform.commit_files import list_trusted, read_trusted
from crab_platform.commit_table import Content, content_of
from crab_platform.packs import CorruptEntry, Entry, Sealed, build_pack, seal_copy
from crab_platform.storage import ShortRead

_Copied = tuple[Entry, Sealed, Any]
"""An entry, its bytes, and its row of the commit that it comes from."""


def copy_entries(cache: FeatureCache, entries: Sequence[Entry]) -> dict[Content, Entry]:
    """Copies entries into a cache, from where it reads them; returns the copies by content (`commit_table.content_of`).

    An entry that is damaged, or whose commit is gone, is not among them. Features that differ under one key, as of
    an encoder that is not deterministic, are all copied, in the order of their commits.
    """
    done: dict[Content, Entry] = {}
    by_layer: dict[str, dict[str, dict[str, Entry]]] = {}
    for entry in entries:
        by_layer.setdefault(entry.layer, {}).setdefault(entry.commit, {})[entry.key] = entry
    for layer, by_commit in by_layer.items():
        store = cache.store_of(layer)
        # What is copied is signed by us, so it is believed no sooner than by an index.
        listed = list_trusted(store, cache.trust, commits.COMMITS, {})
        names = [name for name in listed if name.identifier in by_commit]
        batch: dict[str, _Copied] = {}
        nbytes = 0
        for name, data in read_trusted(store, cache.trust, names, {}):
            try:
                table = commits.read_commit(data, commits.COLUMNS.names)
            except commits.UnusableCommit:
                continue
            for copied in _sealed(cache, table, by_commit[name.identifier]):
                entry, sealed, _ = copied
                other = batch.get(entry.key)
                if _content(entry) in done or (other and other[0].blake3 == entry.blake3):
                    continue  # another copy of the same
                # A commit has one entry of a key.
                if batch and (other or nbytes + sealed.nbytes > cache.pack_bytes):
                    done |= _publish(cache, list(batch.values()))
                    batch, nbytes = {}, 0
                batch[entry.key] = copied
                nbytes += sealed.nbytes
        if batch:
            done |= _publish(cache, list(batch.values()))
    return done


def _sealed(cache: FeatureCache, table: Any, wanted: dict[str, Entry]) -> Iterator[_Copied]:
    for key, entry in wanted.items():
        # Several rows where one clip lies at several places.
        is_it = pc.and_(
            pc.equal(table.column("key"), key), pc.equal(table.column("blake3"), entry.blake3)
        )
        rows = table.filter(is_it)
        if not rows.num_rows:
            continue
        try:
            (data,) = cache.store_of(entry.layer).read_ranges(
                entry.pack, [(entry.offset, entry.length)]
            )
            record = json.loads(rows.column("record")[0].as_py())
            yield entry, seal_copy(entry, record, data), rows
        except (CorruptEntry, FileNotFoundError, ShortRead, ValueError):
            continue  # the next run computes it anew


def _publish(cache: FeatureCache, batch: Sequence[_Copied]) -> dict[Content, Entry]:
    path = commits.pack_path(cache.clock.new_id())
    data, placed = build_pack(path, [sealed for _, sealed, _ in batch])
    at = {entry.key: entry for entry in placed}
    table = pa.concat_tables([rows for _, _, rows in batch])
    keys = table.column("key").to_pylist()
    changed: dict[str, list[Any]] = {
        "schema": [commits.COMMIT_SCHEMA] * len(keys),
        "pack": [path] * len(keys),
        "offset": [at[key].offset for key in keys],
        "length": [at[key].length for key in keys],
    }
    for name, values in changed.items():
        field = commits.COLUMNS.field(name)
        table = table.set_column(
            table.column_names.index(name), field, pa.array(values, field.type)
        )
    table = table.select(commits.COLUMNS.names).cast(commits.COLUMNS)
    identifier = cache.publish(Blob(path=path, data=data), commits.table_to_parquet(table))
    return {
        _content(entry): Entry(
            key=key,
            pack=entry.pack,
            offset=entry.offset,
            length=entry.length,
            blake3=entry.blake3,
            tensors=entry.tensors,
            commit=identifier,
        )
        for key, entry in at.items()
    }


def _content(entry: Entry) -> Content:
    return content_of(entry.key, entry.blake3)
