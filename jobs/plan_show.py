"""A plan for people: what is a hit, why the rest is not, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crab_platform.cost import money
from jobs.output import line, table

MEANING = {
    "hit": "",
    "key_differs": "encoded before, otherwise",
    "stream_new": "the file is in the cache, but nothing of this kind of stream",
    "never_seen": "no commit names this file as it is now; the run hashes it, and may find its bytes known",
    "file_changed": "the file has changed since it was cached",
    "version_unknown": "cached while it was being written, so nothing proves that it is the same; the run hashes it",
    "in_quarantine": "its entry was taken back as bad",
    "unsure": "commits disagree about this file as it is now; the run hashes it",
    "in_flux": "committed, or condemned by garbage collection, just now",
    "set_aside_before": "set aside by the last run; it is tried again",
    "not_found": "there is no such file",
    "unreachable": "the file cannot be read now",
}
"""What each reason says to a person."""

_ALARM = "somebody should look: `crab cache stat` tells which"
_SHOWN_FIELDS = 6


def show_plan(plan: Mapping[str, Any]) -> None:
    """A plan of a preprocess job."""
    rows = [
        (
            group["stream"],
            {"set_aside": "set aside"}.get(group["status"], group["status"]),
            f"{group['count']:,}",
            why(group),
        )
        for group in plan["groups"]
    ]
    table(
        f"{plan['name']}: {plan['clips']:,} clips against {plan['cache']}",
        ("stream", "", "clips", "why"),
        rows,
    )
    if plan["not_used_commits"]:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in plan["not_used_commits"].items()
        )
        line(f"commits that were not used: {reasons}; {_ALARM}")
    if plan["sample"]:
        table(
            f"the first {len(plan['sample'])} that are no hits",
            ("clip", "stream", "reason"),
            [(row["clip"], row["stream"], _brief(row)) for row in plan["sample"]],
        )
    _show_cost(plan)


def show_step(step: Mapping[str, Any]) -> None:
    """A step that preprocesses nothing, or cannot say yet what."""
    which = f"{step['job']} {step['name']!r}"
    if step.get("waits_for"):
        line(
            f"{which}: {step['absent']} is made by step {step['waits_for']!r}, which has not run yet; run it, then "
            "plan again"
        )
    elif "needs" not in step:
        line(f"{which}: reads no features")
    elif step["is_there"]:
        line(f"{which}: reads manifest {step['manifest'][:12]} of {step['cache']}, which is there")
    elif step["made_by"]:
        line(f"{which}: reads the manifest that step {step['made_by']!r} makes")
    elif step["manifest"]:
        line(f"{which}: needs manifest {step['manifest'][:12]}, which is not in {step['cache']}")
    else:
        line(
            f"{which}: needs the manifest of job {step['needs']!r}, which has not run yet: plan and run its spec first"
        )


def why(group: Mapping[str, Any]) -> str:
    """The reason of a group, with fields, values and the runs that it speaks of."""
    parts = [MEANING.get(group["reason"], group["reason"])]
    if group["detail"]:
        parts[0] = f"{parts[0]} ({group['detail']})" if parts[0] else group["detail"]
    for field in group["fields"][:_SHOWN_FIELDS]:
        parts.append(f"{field['field']}: {short(field['cached'])} -> {short(field['wanted'])}")
    if len(group["fields"]) > _SHOWN_FIELDS:
        parts.append(f"and {len(group['fields']) - _SHOWN_FIELDS} more fields (--json has them)")
    if group["from"]:
        parts.append(f"by {told(group['from'][0])}")
    if len(group["from"]) > 1:
        parts.append(f"and {len(group['from']) - 1} other runs")
    return "\n".join(part for part in parts if part)


def told(origin: Mapping[str, Any]) -> str:
    """Who made an entry, and when."""
    words = [f"run {origin['run']}" if origin["run"] else "a run without a name"]
    words += [f"{name} {origin[name]}" for name in ("experiment", "team") if origin[name]]
    if origin["layer"]:
        words.append(f"in {origin['layer']}")
    return ", ".join([*words, origin["at"]])


def short(value: object) -> str:
    """A value of a key record; digests by their first digits."""
    if isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef"):
        return value[:12]
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def size(num_bytes: float | None) -> str:
    """Bytes for a person."""
    if num_bytes is None:
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def span(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return "unknown"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 120 else f"{seconds:.3g} s"


def _brief(row: Mapping[str, Any]) -> str:
    fields: Sequence[Mapping[str, Any]] = row["fields"]
    names = ", ".join(field["field"] for field in fields[:_SHOWN_FIELDS])
    words = row["reason"].replace("_", " ")
    return f"{words}: {names or row['detail']}" if names or row["detail"] else words


def _with(workers: Mapping[str, Any]) -> str:
    return (
        f" at best, with encode_actors {workers['encode_actors']} and decode_processes "
        f"{workers['decode_processes']}, each with a core of its own"
    )


def _show_cost(plan: Mapping[str, Any]) -> None:
    workers = plan["workers"]
    to_read = f"{size(plan['bytes_to_read'])} of {plan['files_to_read']:,} files"
    if plan["files_of_unknown_size"]:
        to_read += f", {plan['files_of_unknown_size']:,} more of unknown size"
    rows = [("read", to_read)]
    if plan["files_to_hash"]:
        rows.append(
            (
                "of these hash first",
                f"{plan['files_to_hash']:,} files, which may then be hits; --hash does it now",
            )
        )
    rows.append(("write", size(plan["bytes_to_write"])))
    rows.append(("CPU time", span(plan["cpu_s"])))
    if plan["gpu_s"]:
        rows.append(("GPU time", span(plan["gpu_s"])))
    elif plan["gpu_s"] is None:
        rows.append(("GPU time", "unknown"))
    rows.append(
        (
            "wall time",
            f"{span(plan['wall_s'])} at best, with {workers['encode_actors']} encode actors",
        )
    )
    spared = plan["spared_decode_s"] + plan["spared_encode_s"]
    if plan["hit"]:
        rows.append(("spared by hits", span(spared) if spared else "unknown"))
    for stream in plan["by_stream"]:
        kept = stream["encode"] - stream["decode"]
        if kept:
            text = (
                f"{kept:,} of {stream['encode']:,} misses: their decoded windows are in the cache"
            )
            rows.append((f"{stream['stream']}: no decoding", text))
    if plan["money"]:
        paid = {
            name: "unknown" if value is None else money(value, plan["money"]["currency"])
            for name, value in plan["money"].items()
            if name != "currency"
        }
        parts = f"compute {paid['compute']}, requests {paid['requests']}, keeping it for a month {paid['store_month']}"
        rows.append(("money", f"{paid['total']}: {parts}"))
    table("what it takes", ("", plan["profile"] or "without prices (--profile)"), rows)
    for stream in plan["by_stream"]:
        for what in ("decode", "encode"):
            rate = stream[f"rate_{what}_s"]
            if rate:
                line(
                    f"{stream['stream']}: {what} {span(rate['mean'])} a clip, the mean of {rate['entries']:,} entries; "
                    f"the last by {told(rate['origin'])}"
                )
        if stream["verdict"]:
            line(f"{stream['stream']}: {stream['verdict']}")
    for note in plan["notes"]:
        line(f"unsure: {note}")
