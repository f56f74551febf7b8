"""Every reader of the cache benchmarks: numbers of samples in, arrays out, over S3 path-style HTTP.

Each `open_*` runs once in the reader's own process, before the clock; what it returns is timed. Peers are used as their
documentation says, with the number of threads that suits them.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cache_data import BUCKET, PER_SHARD, SAMPLE_BYTES, SHAPE, Site
from measure import Arrays, Read
from servers import use_endpoint

THREADS = 32


def _numpy(data: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, np.float16).reshape(SHAPE)


def _batches(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def open_ours(site: Site, options: tuple[int, bool]) -> Read:
    """(samples a call of read, whether every pass loads the index anew): index, look up, read, check."""
    use_endpoint(site.endpoint)
    from crab_platform.cache import FeatureCache
    from crab_platform.storage import open_store

    batch, anew = options
    keys = site.keys
    cache = FeatureCache(open_store(f"s3://{BUCKET}/cache"))
    kept = None if anew else cache.index()

    def read(order: Sequence[int]) -> Arrays:
        index = cache.index() if kept is None else kept
        found: list[np.ndarray[Any, Any]] = []
        for few in _batches(order, batch):
            wanted = [keys[number] for number in few]
            entries = index.lookup(wanted)
            found += [arrays["f"] for arrays in cache.read([entries[key] for key in wanted])]
        return found

    return read


def open_ours_ranges(site: Site, range_bytes: int) -> Read:
    """Our store alone: neighbouring samples as ranges of about so many bytes, no index, no digests."""
    use_endpoint(site.endpoint)
    from crab_platform.cache import FeatureCache
    from crab_platform.storage import open_store

    cache = FeatureCache(open_store(f"s3://{BUCKET}/cache"))
    entries = cache.index().lookup(site.keys)
    places = [entries[key] for key in site.keys]
    store = cache.store

    def read(order: Sequence[int]) -> Arrays:
        groups = _batches(order, range_bytes // SAMPLE_BYTES)
        spans = []
        for group in groups:
            first, last = places[group[0]], places[group[-1]]
            spans.append((first.offset, last.offset + last.length - first.offset))
        found = []
        buffers = store.read_many({places[0].pack: spans})[places[0].pack]
        for group, (start, _), buffer in zip(groups, spans, buffers, strict=True):
            for number in group:
                at = places[number].offset - start
                found.append(_numpy(buffer[at : at + places[number].length]))
        return found

    return read


def open_raw(site: Site, options: tuple[int, int]) -> Read:
    """(connections, bytes a range): the ceiling. Ranges of 0 bytes mean one range a sample."""
    from raw_http import RawClient

    from crab_platform.cache import FeatureCache
    from crab_platform.storage import FolderStore

    connections, range_bytes = options
    cache = FeatureCache(FolderStore(Path(site.root) / BUCKET / "cache"))
    entries = cache.index().lookup(site.keys)
    places = [entries[key] for key in site.keys]
    pack = places[0].pack
    if any(place.pack != pack for place in places):
        raise ValueError("the ceiling is measured on one pack: use fewer samples")
    memory = memoryview(bytearray(max(place.offset + place.length for place in places)))
    client = RawClient(site.endpoint, f"/{BUCKET}/cache/{pack}", connections)

    def read(order: Sequence[int]) -> Arrays:
        spans = [(places[number].offset, places[number].length) for number in order]
        if range_bytes:
            start, stop = spans[0][0], spans[-1][0] + spans[-1][1]
            spans = [(at, min(range_bytes, stop - at)) for at in range(start, stop, range_bytes)]
        client.read(spans, memory)
        return [
            _numpy(memory[places[number].offset :][: places[number].length]) for number in order
        ]

    return read


def open_raw_checked(site: Site, options: tuple[int, int]) -> Read:
    """(connections, bytes a range): the ceiling of who checks: BLAKE3 over each sample, by the thread that read it."""
    from blake3 import blake3
    from raw_http import RawClient, Span

    from crab_platform.cache import FeatureCache
    from crab_platform.storage import FolderStore

    class Checking(RawClient):
        def _fetch(self, sock: socket.socket, spans: Sequence[Span], memory: memoryview) -> None:
            for offset, length in spans:
                super()._fetch(sock, [(offset, length)], memory)
                for at in range(offset, offset + length, SAMPLE_BYTES):
                    blake3(memory[at : at + SAMPLE_BYTES]).hexdigest()

    connections, range_bytes = options
    cache = FeatureCache(FolderStore(Path(site.root) / BUCKET / "cache"))
    entries = cache.index().lookup(site.keys)
    places = [entries[key] for key in site.keys]
    memory = memoryview(bytearray(max(place.offset + place.length for place in places)))
    client = Checking(site.endpoint, f"/{BUCKET}/cache/{places[0].pack}", connections)

    def read(order: Sequence[int]) -> Arrays:
        groups = _batches(order, range_bytes // SAMPLE_BYTES)
        spans = [(places[group[0]].offset, len(group) * SAMPLE_BYTES) for group in groups]
        client.read(spans, memory)
        return [
            _numpy(memory[places[number].offset :][: places[number].length]) for number in order
        ]

    return read


def open_s3fs(site: Site, batch: int) -> Read:
    """One .npy object a sample, `cat` of a batch at a time."""
    import s3fs

    fs = s3fs.S3FileSystem(
        key="bench", secret="bench", endpoint_url=site.endpoint, use_listings_cache=False
    )

    def read(order: Sequence[int]) -> Arrays:
        found = []
        for few in _batches(order, batch):
            names = [f"{BUCKET}/npy/{number}.npy" for number in few]
            data = fs.cat(names)
            found += [np.load(io.BytesIO(data[name])) for name in names]
        return found

    return read


def _boto3(site: Site) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=site.endpoint,
        aws_access_key_id="bench",
        aws_secret_access_key="bench",
        region_name="us-east-1",
        config=Config(max_pool_connections=THREADS, s3={"addressing_style": "path"}),
    )


def open_boto3(site: Site, _: object) -> Read:
    """One .npy object a sample, 32 threads."""
    client, pool = _boto3(site), ThreadPoolExecutor(THREADS)

    def get(number: int) -> np.ndarray[Any, Any]:
        body = client.get_object(Bucket=BUCKET, Key=f"npy/{number}.npy")["Body"].read()
        found: np.ndarray[Any, Any] = np.load(io.BytesIO(body))
        return found

    return lambda order: list(pool.map(get, order))


def _arrow(site: Site) -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(
        access_key="bench",
        secret_key="bench",
        region="us-east-1",
        scheme="http",
        endpoint_override=site.endpoint.removeprefix("http://"),
    )


def open_pyarrow_objects(site: Site, _: object) -> Read:
    """One .npy object a sample through pyarrow's S3FileSystem, 32 threads."""
    store, pool = _arrow(site), ThreadPoolExecutor(THREADS)

    def get(number: int) -> np.ndarray[Any, Any]:
        with store.open_input_file(f"{BUCKET}/npy/{number}.npy") as file:
            found: np.ndarray[Any, Any] = np.load(io.BytesIO(file.read()))
        return found

    return lambda order: list(pool.map(get, order))


def open_pyarrow_parquet(site: Site, _: object) -> Read:
    """The whole parquet file; samples in its order."""
    import pyarrow.parquet as pq

    store = _arrow(site)

    def read(order: Sequence[int]) -> Arrays:
        table = pq.read_table(
            f"{BUCKET}/parquet/samples.parquet", filesystem=store, pre_buffer=True
        )
        found = []
        for chunk in table.column("f").chunks:
            size = len(chunk) * SAMPLE_BYTES
            data = memoryview(chunk.buffers()[1])[chunk.offset * SAMPLE_BYTES :][:size]
            found += list(np.frombuffer(data, np.float16).reshape(-1, *SHAPE))
        return [found[number] for number in order]

    return read


def open_lance(site: Site, batch: int) -> Read:
    """`to_table` for a scan (batch 0), else `take` of a batch at a time."""
    import lance

    dataset = lance.dataset(
        f"s3://{BUCKET}/lance/samples.lance",
        storage_options={
            "aws_endpoint": site.endpoint,
            "aws_access_key_id": "bench",
            "aws_secret_access_key": "bench",
            "aws_region": "us-east-1",
            "allow_http": "true",
        },
    )

    def arrays(table: Any) -> list[np.ndarray[Any, Any]]:
        found = []
        for chunk in table.column("f").chunks:
            found += list(chunk.flatten().to_numpy().reshape(-1, *SHAPE))
        return found

    def read(order: Sequence[int]) -> Arrays:
        if not batch:
            return arrays(dataset.to_table())
        found: list[np.ndarray[Any, Any]] = []
        for few in _batches(order, batch):
            found += arrays(dataset.take(list(few)))
        return found

    return read


def open_webdataset(site: Site, _: object) -> Read:
    """Tar shards one after the other through curl, as webdataset reads http; samples in their order."""
    import webdataset

    last = -(-site.samples // PER_SHARD) - 1
    urls = f"{site.endpoint}/{BUCKET}/wds/{{000000..{last:06d}}}.tar"

    def read(order: Sequence[int]) -> Arrays:
        shards = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        return [np.load(io.BytesIO(row["npy"])) for row in shards]

    return read


def open_safetensors(site: Site, _: object) -> Read:
    """Whole safetensors shards with boto3, then safetensors' own loader; samples in their order."""
    from safetensors.numpy import load

    client, pool = _boto3(site), ThreadPoolExecutor(4)
    shards = range(-(-site.samples // PER_SHARD))

    def get(shard: int) -> dict[str, np.ndarray[Any, Any]]:
        key = f"safetensors/{shard}.safetensors"
        return dict(load(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()))

    def read(order: Sequence[int]) -> Arrays:
        found: dict[str, np.ndarray[Any, Any]] = {}
        for arrays in pool.map(get, shards):
            found |= arrays
        return [found[str(number)] for number in order]

    return read
