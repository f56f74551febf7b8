"""`crab cache verify`: is what is stored what was committed, and what would be computed today?"""

from __future__ import annotations

import secrets
import time
from typing import Any

from crab_platform.cache import FeatureCache
from crab_platform.quarantine import RECOMPUTED_OTHERWISE
from crab_platform.verify import Recomputer, Verified, take_back, verify
from jobs.cache_open import preprocess_spec
from jobs.output import line, progress, table

_SHOWN = 20


def run_verify(
    cache: FeatureCache,
    place: str,
    *,
    share: float,
    seed: int | None = None,
    recompute: str | None = None,
    quarantine: bool = False,
) -> dict[str, Any]:
    """Checks, shows, and returns what `--json` prints; `bad` in it is not empty when something is wrong.

    `recompute` is the spec of a preprocess job. Without a seed one is drawn, which nobody could foresee.
    """
    drawn = secrets.randbits(32) if seed is None else seed
    again = None
    if recompute is not None:
        from jobs.preprocess import build_work  # loads encoders

        again = Recomputer(build_work(preprocess_spec(recompute)))
    started = time.perf_counter()
    with progress("commits", 0) as bar:
        found = verify(cache, share=share, seed=drawn, recompute=again, on_progress=bar)
    seconds = time.perf_counter() - started
    path = take_back(cache, found.bad) if found.bad and quarantine else None
    record = {
        "cache": cache.store.url,
        "seed": drawn,
        "share": share,
        "entries": found.entries,
        "checked": found.checked,
        "bytes": found.bytes,
        "seconds": round(seconds, 3),
        "recomputed": found.recomputed,
        "largest_error": found.largest_error,
        "other_settings": found.other_settings,
        "not_recomputed": [vars(one) for one in found.unanswered],
        "bad": [
            {
                "key": one.entry.key,
                "commit": one.entry.commit,
                "pack": one.entry.pack,
                "source": one.source_url,
                "reason": one.reason,
                "detail": one.detail,
            }
            for one in found.bad
        ],
        "quarantine": path,
    }
    _show(found, record, place, recompute)
    return record


def _show(found: Verified, record: dict[str, Any], place: str, recompute: str | None) -> None:
    seconds = max(record["seconds"], 1e-9)
    rows: list[tuple[str, object]] = [
        ("entries", found.entries),
        (
            "checked",
            f"{found.checked}, {found.bytes / 1e6:.1f} MB at {found.bytes / 1e6 / seconds:.0f} MB/s",
        ),
        ("bad", len(found.bad)),
    ]
    if recompute is not None:
        rows += [
            (
                "computed anew",
                f"{found.recomputed}, largest relative error {found.largest_error:.2g}",
            ),
            ("of other settings than the spec", found.other_settings),
            ("not to be computed anew", len(found.unanswered)),
        ]
    table(f"{record['cache']}, seed {record['seed']}", ("what", "how much"), rows)
    if found.unanswered:
        table(
            "could not be computed anew; that is no fault of the entries",
            ("source", "reason", "detail"),
            [(one.source_url, one.reason, one.detail) for one in found.unanswered[:_SHOWN]],
        )
    if not found.bad:
        line("Nothing is wrong with what was checked.")
        return
    table(
        "bad entries" + (f", the first {_SHOWN}" if len(found.bad) > _SHOWN else ""),
        ("source", "key", "reason", "detail"),
        [
            (one.source_url, one.entry.key[:12], one.reason, one.detail[:120])
            for one in found.bad[:_SHOWN]
        ],
    )
    if record["quarantine"]:
        line(
            f"They are in {record['quarantine']} and are misses from now on. Next: crab run SPEC, with the spec of "
            "their preprocess job; it computes only these"
        )
    else:
        how = "" if recompute is None else f" --recompute {recompute}"
        all_or_sample = "--all" if record["share"] == 1 else f"--sample {record['share']:g}"
        line(
            f"Next: crab cache verify {place} {all_or_sample} --seed {record['seed']}{how} --quarantine, which takes "
            "them back, so that the next preprocess job computes them anew"
        )
    if any(one.reason == RECOMPUTED_OTHERWISE for one in found.bad):
        line(
            "Entries that are computed otherwise today were stored wrong, by a fault or on purpose: look who wrote "
            "them (crab cache stat --by run), and, if they are signed, who has the key"
        )
