"""Bytes, seconds and money of a plan, from measured rates and the prices of a profile. What was never measured is
None, with a note that says what to do about it; no number is invented."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from crab_platform.cost import Prices, Verdict, cache_pays, compute_cost, read_cost, store_cost
from crab_platform.explain import NO_MEDIA
from crab_platform.plan import Plan
from crab_platform.rates import Rate
from crab_platform.work import PipelineConfig, Work


@dataclass(frozen=True, kw_only=True)
class StreamEstimate:
    """One stream of a job."""

    stream: str
    encode: int
    """Entries to compute, at most."""
    decode: int
    """How many of them are decoded as well: the others' decoded windows are in the cache."""
    device: str
    entry_bytes: Rate | None
    decode_s: Rate | None
    encode_s: Rate | None
    verdict: Verdict | None
    """Whether keeping its features is cheaper than making them again; None without prices or rates."""

    @property
    def bytes_to_write(self) -> float | None:
        return _product(self.encode, self.entry_bytes)

    @property
    def decode_total_s(self) -> float | None:
        return _product(self.decode, self.decode_s)

    @property
    def encode_total_s(self) -> float | None:
        return _product(self.encode, self.encode_s)


@dataclass(frozen=True, kw_only=True)
class Money:
    """In the currency of the profile."""

    currency: str
    compute: float | None
    store_month: float | None
    """Keeping what is written for a month."""
    requests: float
    """Reading the media and writing packs and commits; within the store's region."""

    @property
    def total(self) -> float | None:
        return _sum((self.compute, self.store_month, self.requests))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of a whole job. None is unknown."""

    streams: tuple[StreamEstimate, ...]
    bytes_to_write: float | None
    cpu_s: float | None
    """Seconds of a core: decoding, and the cores that an encoder holds."""
    gpu_s: float | None
    wall_s: float | None
    """When every worker has its cores and none waits for the store; the start of workers is not in it."""
    money: Money | None
    notes: tuple[str, ...]


def estimate(plan: Plan, work: Work, prices: Prices | None) -> Estimate:
    """What a plan costs. `prices` None: no money."""
    config = work.config
    notes: dict[str, list[str]] = {}
    streams = tuple(_of_stream(plan, work, name, prices, notes) for name in plan.todo)
    decode_s = _sum(one.decode_total_s for one in streams)
    encode_s = _sum(one.encode_total_s for one in streams)
    to_write = _sum(one.bytes_to_write for one in streams)
    cpu_s = _sum((decode_s, None if encode_s is None else encode_s * config.encode_cpus))
    gpu_s = 0.0 if not config.encode_gpus else _times(encode_s, config.encode_gpus)
    money = None
    if prices is not None:
        packs = math.ceil(max((s.encode for s in streams), default=0) / config.clips_per_pack)
        money = Money(
            currency=prices.currency,
            compute=None if cpu_s is None or gpu_s is None else compute_cost(cpu_s, gpu_s, prices),
            store_month=None if to_write is None else store_cost(to_write, 1, 0, prices),
            requests=store_cost(0, 0, 2 * packs, prices)
            + read_cost(0, plan.to_read, False, prices),
        )
    return Estimate(
        streams=streams,
        bytes_to_write=to_write,
        cpu_s=cpu_s,
        gpu_s=gpu_s,
        wall_s=_wall(decode_s, encode_s, config, plan.to_read),
        money=money,
        notes=tuple(f"{', '.join(names)}: {note}" for note, names in notes.items()),
    )


def _of_stream(
    plan: Plan, work: Work, name: str, prices: Prices | None, notes: dict[str, list[str]]
) -> StreamEstimate:
    todo, rates = plan.todo[name], plan.rates
    record = work.key(name, NO_MEDIA).record()
    device = work.streams[name].device
    entry_bytes = rates.num_bytes(record)
    decode_s, encode_s = rates.decode(record), rates.encode(record, device)
    first = "run it on a few clips first, and plan again"

    def note(text: str) -> None:
        notes.setdefault(text, []).append(name)

    if todo.encode and entry_bytes is None:
        note(
            f"nothing of this encoder and sampling is in the cache to say how large it is: {first}"
        )
    if todo.decode and decode_s is None:
        note(f"no entry says how long decoding takes: {first}")
    if todo.encode and encode_s is None:
        elsewhere = rates.devices(record)
        seen = f" (only on {', '.join(elsewhere)}, which says nothing of it)" if elsewhere else ""
        note(f"no entry says how long encoding takes on {device}{seen}: {first}")
    measured = [("decoding", todo.decode, decode_s), ("encoding", todo.encode, encode_s)]
    for what, count, rate in measured:
        if count and rate is not None and rate.differs:
            note(
                f"the rate of {what} is that of the nearest work measured, which differs in "
                f"{', '.join(rate.differs)}; to be sure, {first}"
            )
    verdict = None
    if prices is not None and entry_bytes and decode_s and encode_s:
        verdict = cache_pays(
            bytes_=entry_bytes.mean,
            decode_cpu_s=decode_s.mean,
            encode_cpu_s=encode_s.mean * work.config.encode_cpus,
            encode_gpu_s=encode_s.mean * work.config.encode_gpus,
            prices=prices,
        )
    return StreamEstimate(
        stream=name,
        encode=todo.encode,
        decode=todo.decode,
        device=device,
        entry_bytes=entry_bytes,
        decode_s=decode_s,
        encode_s=encode_s,
        verdict=verdict,
    )


def _wall(
    decode_s: float | None, encode_s: float | None, config: PipelineConfig, files: int
) -> float | None:
    """Decoding and encoding overlap; the slower of the two sets the pace."""
    if decode_s is None or encode_s is None:
        return None
    actors = max(1, min(config.encode_actors, files))
    at_once = config.decode_tasks if config.mode == "split" else actors
    return max(decode_s / (at_once * config.decode_processes), encode_s / actors)


def _product(count: int, rate: Rate | None) -> float | None:
    if not count:
        return 0.0
    return None if rate is None else count * rate.mean


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _sum(values: Iterable[float | None]) -> float | None:
    """None when one of them is unknown."""
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total
