"""The samples that all readers of the cache benchmarks read, in every layout that one of them wants.

Sample i is an array of float16 [24, 1024], 48 KiB, of random bits without NaN or infinity.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from safetensors.numpy import save_file

from crab_platform.cache import FeatureCache
from crab_platform.identity import FeatureKey, sha256_hex
from crab_platform.packs import new_entry
from crab_platform.storage import FolderStore

SHAPE = (24, 1024)
SAMPLE_BYTES = 48 << 10
BUCKET = "bench"
PER_SHARD = 1000
FORMAT = 2
"""Of the folder. Bump when a layout changes."""


@dataclass(frozen=True)
class Site:
    """Where the samples are served, and what describes them."""

    endpoint: str
    root: str
    samples: int

    @property
    def keys(self) -> list[str]:
        """Cache key of every sample."""
        found: list[str] = json.loads((Path(self.root) / "keys.json").read_text())
        return found


def sample(number: int) -> np.ndarray[Any, Any]:
    """Array of one sample."""
    bits = np.random.default_rng(number).integers(0, 1 << 16, SHAPE, dtype=np.uint16)
    return (bits & 0xBFFF).view(np.float16)  # top bit of the exponent clear: every value is finite


def digest_of(order: Any) -> str:
    """BLAKE3 over the bytes of samples in this order: what every reader must have read."""
    hasher = blake3()
    for number in order:
        hasher.update(sample(number).view(np.uint8).reshape(-1).data)
    return hasher.hexdigest()


def feature_key(number: int) -> FeatureKey:
    """The cache key of a sample."""
    return FeatureKey(
        media_sha256=sha256_hex(str(number).encode()),
        stream="video",
        sampling={"frames": 24},
        decode={"made": "up"},
        encoder={"made": "up"},
        dtype="float16",
    )


def build(root: Path, samples: int, *, peers: bool = True) -> None:
    """Write all layouts below root/bench unless they are there."""
    done = root / "done.json"
    wanted = {"samples": samples, "peers": peers, "format": FORMAT}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return
    shutil.rmtree(root, ignore_errors=True)
    bucket = root / BUCKET
    bucket.mkdir(parents=True)
    arrays = [sample(number) for number in range(samples)]
    keys = [feature_key(number) for number in range(samples)]
    FeatureCache(FolderStore(bucket / "cache")).commit(
        [new_entry(key, {"f": array}) for key, array in zip(keys, arrays, strict=True)]
    )
    (root / "keys.json").write_text(json.dumps([key.digest for key in keys]))
    if peers:
        _peers(bucket, arrays)
    done.write_text(json.dumps(wanted))


def _peers(bucket: Path, arrays: list[np.ndarray[Any, Any]]) -> None:
    import lance

    for name in ("npy", "wds", "safetensors", "parquet"):
        (bucket / name).mkdir()
    for number, array in enumerate(arrays):
        np.save(bucket / f"npy/{number}.npy", array)
    for shard in range(-(-len(arrays) // PER_SHARD)):
        numbers = range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, len(arrays)))
        save_file({str(n): arrays[n] for n in numbers}, bucket / f"safetensors/{shard}.safetensors")
        with tarfile.open(bucket / f"wds/{shard:06d}.tar", "w") as tar:
            for number in numbers:
                buffer = io.BytesIO()
                np.save(buffer, arrays[number])
                info = tarfile.TarInfo(f"{number:08d}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    flat = pa.array([array.tobytes() for array in arrays], pa.binary(SAMPLE_BYTES))
    # 160 samples a row group: reads of about 8 MiB.
    pq.write_table(
        pa.table({"f": flat}),
        bucket / "parquet/samples.parquet",
        row_group_size=160,
        compression="none",
        use_dictionary=False,
    )
    values = pa.array(np.stack(arrays).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(values, SHAPE[0] * SHAPE[1])
    lance.write_dataset(pa.table({"f": rows}), str(bucket / "lance/samples.lance"))
