"""What earlier entries cost, and what that says of new ones: seconds and bytes by encoder, sampling and decoder.

Nothing here is invented. A rate is the mean over entries whose record is that of the work in all
that matters for it, or over those of the record that is nearest, and then it says in what it
differs. Where nothing was measured there is no rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from crab_platform.explain import Ints, Origin, Origins, Shapes, differences, is_features

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A mean over measured entries."""

    mean: float
    """Seconds, or bytes, an entry."""
    entries: int
    origin: Origin
    """Who made the last of them."""
    device: str = ""
    differs: tuple[str, ...] = ()
    """Fields in which their record is not that of the work; empty for the same work."""

    def told(self) -> str:
        """Where it comes from, for a person."""
        text = f"mean of {self.entries:,} entries, the last by {self.origin.told()}"
        return (
            f"{text}; of the nearest work measured, which differs in {', '.join(self.differs)}"
            if self.differs
            else text
        )

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {
            "mean": self.mean,
            "entries": self.entries,
            "device": self.device,
            "differs": list(self.differs),
            "origin": self.origin.record(),
        }


@dataclass(kw_only=True)
class _Tally:
    """What the entries of one shape, encoded on one kind of device, cost."""

    entries: int = 0
    num_bytes: float = 0
    decoded: int = 0
    decode_s: float = 0.0
    encoded: int = 0
    encode_s: float = 0.0
    last: int = -1


class Rates:
    """Takes commits one after the other, then answers. As small as there are shapes."""

    def __init__(self, shapes: Shapes, origins: Origins) -> None:
        self._shapes = shapes
        self._origins = origins
        self._tallies: dict[tuple[int, str], _Tally] = {}

    def add(self, table: Any, shapes: Ints, origins: Ints) -> None:
        """The rows of one commit, with the numbers of their shapes and origins."""
        if not table.num_rows:
            return
        decode_s = table.column("decode_s").to_numpy()
        encode_s = table.column("encode_s").to_numpy()
        length = table.column("length").to_numpy()
        encoded = table.column("device").combine_chunks().dictionary_encode()
        devices = encoded.indices.to_numpy(zero_copy_only=False)
        names = encoded.dictionary.to_pylist()
        pair = shapes.astype(np.int64) * len(names) + devices
        kinds, first, group = np.unique(pair, return_index=True, return_inverse=True)
        sums = [
            np.bincount(group, weights, len(kinds))
            for weights in (length, decode_s, encode_s, decode_s > 0, encode_s > 0)
        ]
        counts = np.bincount(group, minlength=len(kinds))
        for n, kind in enumerate(kinds.tolist()):
            tally = self._tallies.setdefault(
                (kind // len(names), names[kind % len(names)]), _Tally()
            )
            tally.entries += int(counts[n])
            tally.num_bytes += float(sums[0][n])
            tally.decode_s += float(sums[1][n])
            tally.encode_s += float(sums[2][n])
            tally.decoded += int(sums[3][n])
            tally.encoded += int(sums[4][n])
            tally.last = int(origins[first[n]])

    def num_bytes(self, wanted: Record) -> Rate | None:
        """Bytes an entry of the same encoder, sampling and form on disk; None where there are none."""
        same = ("stream", "encoder", "sampling", "dtype", "codec")
        return self._mean(
            wanted, same, lambda t: (t.num_bytes, t.entries), nearest=False, want_features=True
        )

    def decode(self, wanted: Record) -> Rate | None:
        """Seconds of decoding, of the same sampling and decoder or the nearest."""
        return self._mean(
            wanted, ("stream", "sampling", "decode"), lambda t: (t.decode_s, t.decoded)
        )

    def encode(self, wanted: Record, device: str) -> Rate | None:
        """Seconds of encoding on that kind of device, of the same encoder and sampling or the nearest."""
        return self._mean(
            wanted,
            ("stream", "encoder", "sampling"),
            lambda t: (t.encode_s, t.encoded),
            device=device,
            want_features=True,
        )

    def devices(self, wanted: Record) -> list[str]:
        """Where entries of this kind of stream were encoded and timed."""
        return sorted(
            {
                device
                for (shape, device), tally in self._tallies.items()
                if tally.encoded
                and device
                and self._shapes.records[shape].get("stream") == wanted["stream"]
            }
        )

    def _mean(
        self,
        wanted: Record,
        fields: tuple[str, ...],
        measured: Callable[[_Tally], tuple[float, int]],
        *,
        device: str | None = None,
        nearest: bool = True,
        want_features: bool = False,
    ) -> Rate | None:
        """The mean over the shapes that agree with `wanted` in `fields`, or are nearest in them."""
        matter = {name: wanted[name] for name in fields if name in wanted}
        by_distance: dict[tuple[str, ...], list[tuple[float, int, int]]] = {}
        for (shape, on), tally in self._tallies.items():
            record = self._shapes.records[shape]
            total, count = measured(tally)
            if not count or record.get("stream") != wanted["stream"]:
                continue
            if (device is not None and on != device) or (want_features and not is_features(record)):
                continue
            theirs = {name: record[name] for name in fields if name in record}
            differs = tuple(name for name, _, _ in differences(theirs, matter))
            if nearest or not differs:
                by_distance.setdefault(differs, []).append((total, count, tally.last))
        if not by_distance:
            return None
        origins = self._origins.origins
        differs = min(
            by_distance, key=lambda d: (len(d), -sum(count for _, count, _ in by_distance[d]))
        )
        chosen = by_distance[differs]
        count = sum(number for _, number, _ in chosen)
        last = max((last for _, _, last in chosen), key=lambda number: origins[number].commit)
        return Rate(
            mean=sum(total for total, _, _ in chosen) / count,
            entries=count,
            origin=origins[last],
            device=device or "",
            differs=differs,
        )
