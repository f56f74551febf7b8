"""Whether a clip is in the cache, where, and if not, what differs: `crab cache why CLIP`."""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from crab_platform import condemned
from crab_platform import source as media
from crab_platform.cache import FeatureCache
from crab_platform.explain import JOB, Origin, differences, is_features, scan_all
from crab_platform.index import CacheIndex
from crab_platform.plan import Aside, set_aside_before
from crab_platform.plan_lookup import SET_ASIDE_BEFORE, UNREADABLE
from crab_platform.plan_table import Status
from crab_platform.quarantine import read_quarantine
from crab_platform.storage import Store
from crab_platform.work import Source
from jobs.cache_open import open_place, preprocess_spec
from jobs.caches import open_cache
from jobs.output import line, read_result
from jobs.plan import fields_record, sources_of
from jobs.plan_media import sha256_of
from jobs.plan_show import (
    MAYBE_NOT_TAKEN,
    MEANING,
    not_trusted,
    size,
    span,
    spec_name,
    spec_value,
    told,
)
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec, SpecError

_COLUMNS = (
    "key",
    "pack",
    "offset",
    "length",
    "record",
    "media_sha256",
    "source_url",
    "source_version",
    "run",
    "experiment",
    "team",
    "decode_s",
    "encode_s",
    "device",
    "tolerance",
)
_HEX = set("0123456789abcdef")
_FEWEST_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a person means by CLIP."""

    url: str = ""
    names: tuple[str, ...] = ()
    """What the data of the spec calls it; none for a clip that is not in it."""
    streams: tuple[str, ...] = ()
    """What the job wants of it."""
    sha256: str = ""
    digits: str = ""
    """The first digits of a media's SHA-256, or of a key."""
    problem: str = ""


def why(clip: str, spec_path: str | None, cache_place: str | None) -> dict[str, Any]:
    """Answers for one clip, as plain values, and shows them.

    With a spec: for each stream hit or miss, and how each earlier entry of the media differs. Without:
    every entry of the media.

    Raises SpecError when neither is given, or nothing is known of CLIP; StoreUnreachable.
    """
    if spec_path is None:
        if cache_place is None:
            raise SpecError(
                "give --spec SPEC to compare with a job, or --cache CACHE to list what there is"
            )
        cache = open_place(cache_place)
        asked = _asked(clip, [])
        entries, at_url = _entries(cache, asked)
        if not entries and not at_url and not asked.sha256:
            raise SpecError(
                f"{clip}: no such file, and nothing of that name or digest is in {cache.store.url}"
            )
        result: dict[str, Any] = {
            "clip": clip,
            "cache": cache.store.url,
            "media_sha256": asked.sha256,
            "entries": entries,
            "other_versions": at_url,
        }
        _show_entries(result)
        return result
    spec = preprocess_spec(spec_path)
    if cache_place is None:
        cache = open_cache(spec.cache.model_copy(update={"zone": "", "local": None}))
    else:
        cache = open_place(cache_place)
    asked = _asked(clip, sources_of(spec))
    entries, at_url = _entries(cache, asked)
    before = _before(spec, cache.store)
    shas = sorted({entry["media_sha256"] for entry in entries})
    if asked.digits and not shas:  # a clip that has no entry, since all of it was set aside
        held_back = {aside.media_sha256 for aside in before.values()}
        shas = sorted(sha for sha in held_back if sha.startswith(asked.digits))
    if asked.digits and len(shas) != 1:
        known = "nothing" if not shas else f"{len(shas)} media"
        raise SpecError(
            f"{clip}: {known} in {cache.store.url} begins so; give more digits, a path or a name of the data"
        )
    sha256 = asked.sha256 or (shas[0] if shas else "")
    asides = _asides(before, asked, sha256)
    work = build_work(spec)
    stores = (cache.store, *cache.layers)
    index = cache.index({store.url: condemned.left_out(store)[1] for store in stores})
    streams: list[dict[str, Any]] = []
    for name in asked.streams or tuple(work.streams):
        if not sha256:
            streams.append({"stream": name, "status": "set_aside", "reason": asked.problem})
            continue
        key = work.key(name, sha256)
        found = index.lookup([key.digest]).get(key.digest)
        kin = [entry for entry in entries if entry["record"].get("stream") == key.stream]
        held = [
            e for e in entries if found and e["key"] == key.digest and e["commit"] == found.commit
        ]
        others = [
            {**entry, "fields": fields_record(differences(entry["record"], key.record()))}
            for entry in kin
            if is_features(entry["record"]) and entry not in held
        ]
        others.sort(key=lambda entry: entry["commit"], reverse=True)
        others.sort(key=lambda entry: len(entry["fields"]))
        if asked.digits and not held and not others and name not in asides:
            continue  # the media was given by its digest: what it has none of was not asked for
        windows = work.decoded_key(name, sha256).digest
        status: Status = "hit" if found else "miss"
        reason = "hit" if found else _reason(others, bool(entries), at_url)
        if not found and name in asides:
            status, reason = "set_aside", SET_ASIDE_BEFORE
        streams.append(
            {
                "stream": name,
                "status": status,
                "reason": reason,
                "detail": asides[name] if status == "set_aside" else "",
                "key": key.digest,
                "entry": held[0] if held else None,
                "decoded_kept": windows in index,
                "earlier": others,
            }
        )
    result = {
        "clip": clip,
        "cache": cache.store.url,
        "media_sha256": sha256,
        "in_spec": None if asked.digits else bool(asked.names),
        "streams": streams,
        "other_versions": at_url,
        "not_used_commits": _not_used(index),
    }
    _show(result, cache_place or spec_path)
    return result


def _before(spec: PreprocessSpec, store: Store) -> dict[tuple[str, str], Aside]:
    """What the job's last manifest set aside, by name and stream."""
    last = read_result(spec.folder)
    return set_aside_before(store, str(last["manifest"])) if last and "manifest" in last else {}


def _asides(before: Mapping[tuple[str, str], Aside], asked: Asked, sha256: str) -> dict[str, str]:
    """Stream -> why the last run set it aside, of these very bytes."""
    return {
        stream: aside.reason
        for (name, stream), aside in before.items()
        if (name in asked.names or asked.digits)
        and aside.media_sha256 == sha256
        and aside.reason not in UNREADABLE
    }


def _not_used(index: CacheIndex) -> dict[str, int]:
    """Reason -> commits, here and in the layers below."""
    return dict(
        Counter(reason for one in (index, *index.below) for reason in one.skipped_commits.values())
    )


def _asked(clip: str, sources: Sequence[Source]) -> Asked:
    """What CLIP means: digits, a name of the data set, a path or a URL. Files are hashed."""
    if _FEWEST_DIGITS <= len(clip) <= 64 and set(clip) <= _HEX and not Path(clip).exists():
        return Asked(digits=clip)
    source = _source(clip, sources)
    names: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    if source is not None:
        url, names, streams = source.url, (source.name, *source.aliases), source.streams
    elif "://" in clip or Path(clip).exists() or not sources:
        url = _place(clip)
    else:
        known = [name for one in sources for name in (one.name, *one.aliases)]
        near = difflib.get_close_matches(
            clip, [*known, *(name.rpartition("/")[2] for name in known)], n=1
        )
        hint = f"; did you mean {near[0]!r}?" if near else f"; the first name there is {known[0]!r}"
        raise SpecError(f"{clip} is no file, no digest, and no name of the data of this spec{hint}")
    try:
        sha256, _ = sha256_of(url)
    except FileNotFoundError:
        return Asked(url=url, names=names, streams=streams, problem=media.NOT_FOUND)
    except Exception:  # any client's error: the answer says that the file cannot be read
        return Asked(url=url, names=names, streams=streams, problem=media.UNREACHABLE)
    return Asked(url=url, names=names, streams=streams, sha256=sha256)


def _place(clip: str) -> str:
    """A URL as it is, a path as the data of a spec has it: absolute, and without `..`."""
    return os.path.abspath(clip.removeprefix("file://")) if media.is_local(clip) else clip


def _source(clip: str, sources: Sequence[Source]) -> Source | None:
    """The source that is meant by its name, the end of its name, or its place."""
    place = _place(clip)
    for source in sources:
        if clip in (source.name, *source.aliases) or _place(source.url) == place:
            return source
    ends = [s for s in sources if any(n.endswith(f"/{clip}") for n in (s.name, *s.aliases))]
    if len(ends) > 1:
        raise SpecError(f"{clip} may be {ends[0].name} or {ends[1].name}; give more of its name")
    return ends[0] if ends else None


def _entries(
    cache: FeatureCache, asked: Asked
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(entries of the media, the newest first; what else was once at its URL), in one pass over the commits."""
    taken_back = {
        (entry.key, entry.commit): entry.reason
        for store in (cache.store, *cache.layers)
        for _, entry in read_quarantine(store, cache.trust)
    }
    entries: list[dict[str, Any]] = []
    others: dict[tuple[str, str], dict[str, Any]] = {}
    for layer, name, columns in scan_all(cache, _COLUMNS):
        wanted = _mask(columns, asked)
        for row in columns.filter(wanted).to_pylist():
            origin = Origin(
                commit=name.identifier,
                run=row.pop("run"),
                experiment=row.pop("experiment"),
                team=row.pop("team"),
                layer=layer,
                job=row.pop(JOB),
            )
            row["record"] = json.loads(row["record"])
            is_same = not asked.sha256 or row["media_sha256"] == asked.sha256
            if not asked.digits and not asked.sha256:  # a file that is gone: what was there
                is_same = False
            if is_same:
                quarantined = taken_back.get((row["key"], name.identifier), "")
                entries.append({**row, **origin.record(), "quarantined": quarantined})
            else:
                place = (row["media_sha256"], row["source_version"])
                others[place] = {
                    "media_sha256": row["media_sha256"],
                    "source_url": row["source_url"],
                    "source_version": row["source_version"],
                    "from": origin.record(),
                }
    entries.reverse()
    return entries, list(others.values())


def _mask(columns: Any, asked: Asked) -> Any:
    """Which rows of a commit are of the media, or were at its URL."""
    nothing = pa.scalar(False)
    media_column, key = columns.column("media_sha256"), columns.column("key")
    if asked.digits:
        return pc.or_(pc.starts_with(media_column, asked.digits), pc.starts_with(key, asked.digits))
    same = pc.equal(media_column, asked.sha256) if asked.sha256 else nothing
    return pc.or_(same, pc.equal(columns.column("source_url"), asked.url))


def _reason(others: Sequence[Mapping[str, Any]], seen: bool, at_url: Sequence[object]) -> str:
    if others:
        if not others[0]["fields"]:
            return "in_quarantine" if others[0]["quarantined"] else "in_flux"
        return "key_differs"
    if seen:
        return "stream_new"
    return "file_changed" if at_url else "never_seen"


def _show(result: Mapping[str, Any], place: str) -> None:
    line(f"{result['clip']}: media {result['media_sha256'] or 'unknown'}")
    if result["in_spec"] is False:
        line("  it is no clip of this spec's data: what follows is for every stream of the job")
    if not result["streams"]:
        line(f"  no entry of it is in {result['cache']}, and the last run set none of it aside")
    shared = _decoded_together(result["streams"])
    if shared:
        line(f"  decode {span(shared)}, for all its streams together")
    for one in result["streams"]:
        line("")
        detail = f" ({one['detail']})" if one.get("detail") else ""
        if one["status"] == "hit":
            line(f"{one['stream']}: hit, key {one['key']}")
            if one["entry"]:
                _show_where(one["entry"], with_decode=not shared)
        else:
            why = MEANING[one["reason"]]
            if one["reason"] == "never_seen" and not_trusted(result["not_used_commits"]):
                why += f"; {MAYBE_NOT_TAKEN}"
            line(f"{one['stream']}: {one['status'].replace('_', ' ')}, {why}{detail}")
        if one.get("decoded_kept") and one["status"] == "miss":
            line("  its decoded windows are in the cache: it would not be decoded again")
        for entry in one.get("earlier", ())[:10]:
            line(f"  earlier entry {entry['key'][:12]} by {told(entry)}{_taken_back(entry)}")
            for field in entry["fields"]:
                line(
                    f"    {spec_name(field['field'], one['stream'])}: {spec_value(field, 'cached')} there, "
                    f"{spec_value(field, 'wanted')} wanted"
                )
        if len(one.get("earlier", ())) > 10:
            line(f"  and {len(one['earlier']) - 10} more (--json has them)")
    _show_other_versions(result)
    if result["not_used_commits"]:
        told_of = ", ".join(f"{count:,} {why}" for why, count in result["not_used_commits"].items())
        line(
            f"commits that were not used: {told_of}; somebody should look: `crab cache stat {shlex.quote(place)}` "
            "lists them"
        )


def _decoded_together(streams: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds that one run took to decode all streams, each entry bearing its share; None where there is no such run
    of two or more."""
    entries = [one["entry"] for one in streams if one.get("entry")]
    shares = [entry["decode_s"] for entry in entries]
    runs = {(entry["run"], entry["layer"]) for entry in entries}
    is_one = len(entries) > 1 and len(entries) == len(streams) and len(runs) == 1
    return sum(shares) if is_one and all(shares) else None


def _show_entries(result: Mapping[str, Any]) -> None:
    found = result["entries"]
    line(f"{result['clip']}: {len(found)} entries in {result['cache']}, the newest first")
    for entry in found:
        key = entry["record"]
        what = (
            "decoded windows"
            if key.get("level")
            else key.get("encoder", {}).get("name", "features")
        )
        line("")
        line(f"{key.get('stream', '')}: {what}, key {entry['key']}{_taken_back(entry)}")
        _show_where(entry)
    _show_other_versions(result)


def _show_where(entry: Mapping[str, Any], *, with_decode: bool = True) -> None:
    place = f" of {entry['layer']}" if entry["layer"] else ""
    line(f"  by {told(entry)}")
    line(
        f"  {size(entry['length'])} at byte {entry['offset']} of {entry['pack']}{place}, commit {entry['commit']}"
    )
    cost = f"encode {span(entry['encode_s'] or None)}"
    if with_decode:
        cost = f"its share of the decode {span(entry['decode_s'] or None)}, {cost}"
    line(
        f"  it cost: {cost}{' on ' + entry['device'] if entry['device'] else ''}; tolerance {entry['tolerance']:g}"
    )


def _show_other_versions(result: Mapping[str, Any]) -> None:
    for one in result["other_versions"]:
        line(
            f"at that place lay once media {one['media_sha256'][:12]} (version {one['source_version'] or 'unknown'}), "
            f"cached by {told(one['from'])}"
        )


def _taken_back(entry: Mapping[str, Any]) -> str:
    return f" (in quarantine: {entry['quarantined']})" if entry["quarantined"] else ""
