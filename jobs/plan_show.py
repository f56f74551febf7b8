"""A plan for people: what is a hit, why the rest is not, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from crab_platform.cost import money
from crab_platform.explain import maker
from crab_platform.identity import ABSENT, RAW
from crab_platform.trust import DISTRUST
from jobs.output import line, table

MEANING = {
    "hit": "",
    "key_differs": "encoded before, otherwise",
    "stream_new": "the file is in the cache, but nothing of this kind of stream",
    "never_seen": "never seen here, neither under this name nor by its content",
    "file_changed": "the file has changed since it was cached",
    "version_unknown": "cached while it was being written, so nothing proves that it is the same; the run hashes it",
    "in_quarantine": "its entry was taken back as bad",
    "unsure": "commits disagree about this file as it is now; the run hashes it",
    "in_flux": "committed, or condemned by garbage collection, just now",
    "set_aside_before": "by the last run; it is tried again",
    "not_found": "there is no such file",
    "unreachable": "the file cannot be read now",
}
"""What each reason says to a person."""

NEVER_SEEN_UNHASHED = (
    "never seen here under this name, size and time (known by its content? --hash checks)"
)
"""The same of files that were not read."""

MAYBE_NOT_TAKEN = "it may be in one of the commits that are not trusted"

_ALARM = "somebody should look: `crab cache stat SPEC` with this spec lists them"
_ADVICE = "run it on a few clips first, and plan again"
_SHOWN_FIELDS = 6
_SPEC_NAMES = {"dtype": "encoders.store_as", "codec": "encoders.codec"}
_LAYERS = ("encoder.layers", "video")


def show_plan(plan: Mapping[str, Any]) -> None:
    """A plan of a preprocess job."""
    meaning = dict(MEANING)
    if plan["files_to_hash"]:
        meaning["never_seen"] = NEVER_SEEN_UNHASHED
    if not_trusted(plan["not_used_commits"]):
        meaning["never_seen"] += f"; {MAYBE_NOT_TAKEN}"
    rows = [
        (
            group["stream"],
            {"set_aside": "set aside"}.get(group["status"], group["status"]),
            f"{group['count']:,}",
            why(group, meaning),
        )
        for group in plan["groups"]
    ]
    table(
        f"{plan['name']}: {plan['clips']:,} clips against {plan['cache']}",
        ("stream", "status", "count", "why"),
        rows,
    )
    if plan["not_used_commits"]:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in plan["not_used_commits"].items()
        )
        line(f"commits that were not used: {reasons}; {_ALARM}")
    if plan["sample"]:
        table(
            f"the first {len(plan['sample'])} streams of clips that are no hits",
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


def why(group: Mapping[str, Any], meaning: Mapping[str, str] = MEANING) -> str:
    """The reason of a group, with fields, values and the runs that it speaks of."""
    parts = [meaning.get(group["reason"], group["reason"])]
    if group["detail"]:
        parts[0] = f"{parts[0]} ({group['detail']})" if parts[0] else group["detail"]
    for field in group["fields"][:_SHOWN_FIELDS]:
        name = spec_name(field["field"], group["stream"])
        parts.append(f"{name}: {spec_value(field, 'cached')} -> {spec_value(field, 'wanted')}")
    if len(group["fields"]) > _SHOWN_FIELDS:
        parts.append(f"and {len(group['fields']) - _SHOWN_FIELDS} more fields (--json has them)")
    if group["from"]:
        parts.append(f"by {told(group['from'][0])}")
    if len(group["from"]) > 1:
        parts.append(f"and {len(group['from']) - 1} other runs")
    return "\n".join(part for part in parts if part)


def told(origin: Mapping[str, Any]) -> str:
    """Who made an entry, and when."""
    words = [maker(origin["job"], origin["run"])]
    words += [f"{name} {origin[name]}" for name in ("experiment", "team") if origin[name]]
    if origin["layer"]:
        words.append(f"in {origin['layer']}")
    return ", ".join([*words, origin["at"]])


def not_trusted(skipped: Iterable[str]) -> bool:
    """Whether commits were passed over because of who wrote them; `skipped` are reasons."""
    return any(reason in DISTRUST for reason in skipped)


def spec_name(field: str, stream: str) -> str:
    """What a field of a key record is called in a spec; those that no spec sets keep their name.

    `stream`: a name such as "video" or "audio:music-avqa".
    """
    if field in _SPEC_NAMES:
        return _SPEC_NAMES[field]
    side = "audio" if stream.partition(":")[0] == "audio" else "video"
    if field == "encoder.compute_dtype":
        return f"encoders.{side}.dtype"
    return f"encoders.{side}.select_layers" if (field, side) == _LAYERS else field


def spec_value(field: Mapping[str, Any], which: str) -> str:
    """A value of a field that differs, as a spec would say it; `which`: "cached" or "wanted"."""
    value = field[which]
    return RAW if field["field"] == "codec" and value == ABSENT else short(value)


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
    return f"{num_bytes / 1e3:.3g} kB" if num_bytes >= 1e3 else f"{num_bytes:.0f} B"


def span(seconds: float | None) -> str:
    """A duration for a person."""
    if seconds is None:
        return "unknown"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:,.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 120 else f"{seconds:.3g} s"


def _brief(row: Mapping[str, Any]) -> str:
    fields: Sequence[Mapping[str, Any]] = row["fields"]
    names = ", ".join(spec_name(field["field"], row["stream"]) for field in fields[:_SHOWN_FIELDS])
    words = row["reason"].replace("_", " ")
    return f"{words}: {names or row['detail']}" if names or row["detail"] else words


def _wall(plan: Mapping[str, Any]) -> str:
    if plan["wall_s"] is None:
        return "unknown"
    actors = plan["workers"]["encode_actors"]
    with_actors = f"with {actors} encode actor{'' if actors == 1 else 's'}"
    start = ", plus the start of Ray" if plan["miss"] else ""
    return f"{span(plan['wall_s'])} at best, {with_actors}{start}"


def _unsure(notes: Sequence[str]) -> str:
    """Notes ("STREAMS: WHAT") in one line; the streams and the advice that they share come once."""
    told: dict[str, list[str]] = {}
    is_advised = False
    for note in notes:
        for ending in (f": {_ADVICE}", f"; to be sure, {_ADVICE}"):
            if note.endswith(ending):
                note, is_advised = note.removesuffix(ending), True
        streams, _, what = note.partition(": ")
        told.setdefault(streams, []).append(what)
    whats = "; ".join(f"{streams}: {', and '.join(what)}" for streams, what in told.items())
    return whats + (f". To be sure, {_ADVICE}" if is_advised else "")


def _show_cost(plan: Mapping[str, Any]) -> None:
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
    rows.append(("wall time", _wall(plan)))
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
    if plan["notes"]:
        line(f"unsure: {_unsure(plan['notes'])}")
