"""`crab cache ...`: look into a cache that teams share, keep it sound, and keep it small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="cache",
    no_args_is_help=True,
    help="""Look into a feature cache, keep it sound, and keep it small.

    CACHE is a folder, s3://bucket/prefix (credentials come from AWS_* variables), or the spec of a job: then its
    `cache:` counts with the zones that it trusts.

      crab cache stat work/cache                          what is in it, and what it has saved

      crab cache verify work/cache --sample 0.01          is it what was stored?

      crab cache pin work/cache preprocess-shapes --project demo

      crab cache gc work/cache                            what would go; --apply does it

    Exit codes: 0 done, 1 something is wrong with the cache, 2 wrong input, 3 cannot reach something.
    """,
)

CachePlace = Annotated[
    str, typer.Argument(metavar="CACHE", help="A folder, s3://bucket/prefix, or a spec.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]


@app.command()
def stat(
    cache: CachePlace,
    by: Annotated[str, typer.Option(help="encoder, experiment, team or run.")] = "encoder",
    since: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="DAYS", help="Only what was stored, and jobs that ended, since."
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Also say what was saved in money: a profile's name, or its file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count entries, bytes, hits and what they saved, and tell what somebody should look at.

    Hits and savings come from what finished jobs left in the cache. Alarms tell of commits by zones that are not
    trusted, and of keys whose entries differ.

      crab cache stat work/cache --by team --since 30 --profile laptop
    """
    from jobs.cache_open import open_place
    from jobs.cache_stat import stat as run

    _print(run(open_place(cache), by, since, profile), as_json)


@app.command()
def why(
    clip: Annotated[
        str,
        typer.Argument(
            help="A file, a URL, a name in the data of the spec, or the first digits of a media's SHA-256 or of a key."
        ),
    ],
    spec: Annotated[
        str | None, typer.Option(help="A preprocess spec: is this clip a hit for it, and why not?")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="Another cache than the spec's; or, without a spec, the cache."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a clip is in the cache, where, by whom and what it cost; if not, how earlier entries differ.

    The file is read and hashed, so the answer is for its bytes as they are now. The nearest entries come first, with
    the fields of the key that differ. Without --spec all entries of the clip are listed.

      crab cache why work/shapes/clips/shapes-1-000004.mp4 --spec jobs/specs/preprocess-shapes.yaml

      crab cache why 9f86d081884c --cache s3://bucket/features
    """
    from jobs.cache_why import why as run

    _print(run(clip, spec, cache), as_json)


@app.command()
def verify(
    cache: CachePlace,
    sample: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the entries, at least one.")
    ] = 0.01,
    all_: Annotated[bool, typer.Option("--all", help="Every entry.")] = False,
    seed: Annotated[
        int | None, typer.Option(help="Take the sample of an earlier run; else a new one is drawn.")
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Also decode and encode again, as this preprocess spec does."
        ),
    ] = None,
    quarantine: Annotated[
        bool, typer.Option(help="Take bad entries back, so that the next job computes them anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check stored features against their digests and, with --recompute, against what is computed today.

    Digests find damage. Only computing anew finds what was stored wrong from the start; each entry knows how far it may
    be off. Media that moved since are told, and are no fault of an entry. Exit code 1 when there are bad entries.

      crab cache verify work/cache --sample 0.01 --recompute jobs/specs/preprocess-shapes.yaml
    """
    from jobs.cache_open import open_place
    from jobs.cache_verify import run_verify

    opened = open_place(cache, signs=quarantine)
    share = 1.0 if all_ else sample
    result = run_verify(
        opened, cache, share=share, seed=seed, recompute=recompute, quarantine=quarantine
    )
    _print(result, as_json)
    if result["bad"]:
        raise typer.Exit(1)


@app.command()
def gc(
    cache: CachePlace,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else only tell.")] = False,
    grace_days: Annotated[
        float, typer.Option(min=0, help="Nothing younger is touched; at least 0.1.")
    ] = 7,
    sweep_after_days: Annotated[
        float,
        typer.Option(min=0, help="Condemned files are deleted so much later; 40 minutes at least."),
    ] = 3,
    as_json: AsJson = False,
) -> None:
    """Find what no live job and no pin needs; with --apply condemn it, and delete what was condemned days ago.

    Kept is what the manifests of live jobs and of all pins name, of all projects, and everything young. Run it with
    --apply once a day. A pass that was killed is taken up by the next.

      crab cache gc work/cache

      crab cache gc work/cache --apply
    """
    from jobs.cache_gc import collect
    from jobs.cache_open import open_place

    result = collect(
        open_place(cache),
        cache,
        apply=apply,
        grace_days=grace_days,
        sweep_after_days=sweep_after_days,
    )
    _print(result, as_json)


@app.command()
def pin(
    cache: CachePlace,
    manifest: Annotated[
        str,
        typer.Argument(help="A digest, 8 or more of its digits, or the name of a preprocess job."),
    ],
    project: Annotated[str, typer.Option(help="Whose pin it is.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the pin; else that of the job, or the digest.")
    ] = None,
    reason: Annotated[str, typer.Option(help="For those who ask later.")] = "",
    runs: Runs = Path("work/runs"),
    as_json: AsJson = False,
) -> None:
    """Keep the features of a manifest until `unpin`, whatever garbage collection runs.

    crab cache pin work/cache preprocess-shapes --project demo --reason "the figures of our paper"
    """
    from jobs.cache_open import open_place
    from jobs.cache_pins import pin as run

    opened = open_place(cache)
    result = run(opened, cache, manifest, runs, project=project, name=name, reason=reason)
    _print(result, as_json)


@app.command()
def unpin(
    cache: CachePlace,
    pin: Annotated[str, typer.Argument(metavar="PROJECT/NAME", help="As `crab cache pins` shows.")],
    as_json: AsJson = False,
) -> None:
    """End a pin. Nothing is deleted by that; garbage collection may do it later.

    crab cache unpin work/cache demo/preprocess-shapes
    """
    from jobs.cache_open import open_place
    from jobs.cache_pins import unpin as run

    _print(run(open_place(cache), pin), as_json)


@app.command()
def pins(cache: CachePlace, as_json: AsJson = False) -> None:
    """List the pins of all projects."""
    from jobs.cache_open import open_place
    from jobs.cache_pins import pins as run

    _print(run(open_place(cache)), as_json)


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="New file for the private key; keep it secret.")],
    as_json: AsJson = False,
) -> None:
    """Make the key with which a team signs what it commits, and print what others put into their specs.

    crab cache keygen ~/.crab/vision.key
    """
    from crab_platform.trust import make_key
    from jobs.spec_cache import SIGNING_KEY_VARIABLE
    from jobs.spec_errors import SpecError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        public = make_key(file)
    except FileExistsError as error:
        raise SpecError(
            f"{file} exists; a key is never overwritten. Choose another name"
        ) from error
    except OSError as error:
        raise SpecError(f"cannot write {file}: {error.strerror}") from error
    text = f"""public key: {public}

Those who sign with it start jobs with
  export {SIGNING_KEY_VARIABLE}={file.absolute()}
and have in their spec, with a name for their zone:
  cache: {{url: ..., zone: NAME, trust: {{NAME: {public}}}}}

Those who want to take what it signs have in theirs:
  cache: {{url: ..., trust: {{NAME: {public}}}}}"""
    if as_json:
        _print({"file": str(file), "public_key": public}, True)
    else:
        print(text)


@app.command()
def snapshot(
    cache: CachePlace,
    all_: Annotated[
        bool, typer.Option("--all", help="Even when there are few commits that no snapshot holds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows of many commits into a few files, so that jobs start faster.

    A snapshot is a copy and may be deleted at any time; old ones, of which most is gone, are deleted here.

      crab cache snapshot work/cache
    """
    from crab_platform.snapshots import FEWEST, snapshot_commits
    from jobs.cache_open import open_place
    from jobs.output import line

    opened = open_place(cache, signs=True)
    written = snapshot_commits(opened, fewest=1 if all_ else FEWEST)
    line(
        f"{written} commits are in new snapshots"
        if written
        else f"fewer than {FEWEST} commits are in no snapshot: nothing to do (--all does it nevertheless)"
    )
    _print({"cache": opened.store.url, "commits": written}, as_json)


@app.command()
def audit(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A preprocess spec.")],
    clips: Annotated[int, typer.Option(min=1, help="So many clips are decoded and encoded.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show that keys cover all that decides features: watches every file, variable and socket while some are made.

    Nothing is stored. Exit code 1 when something was read that no key covers, with its name. (What native libraries
    open by themselves is watched with strace in our tests.)

    crab cache audit jobs/specs/preprocess-shapes.yaml
    """
    from jobs.cache_audit import run_audit

    result = run_audit(spec, clips)
    _print(result, as_json)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command()
def compact(
    cache: CachePlace,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; else only tell.")] = False,
    grace_days: Annotated[
        float, typer.Option(min=0, help="Younger packs are left alone; at least 0.1.")
    ] = 7,
    as_json: AsJson = False,
) -> None:
    """Put together what small and half-dead packs hold, so that reading takes fewer requests.

    Copies what the manifests of jobs and pins need. The old packs go with garbage collection, days later; whoever reads
    them finds the copies.

      crab cache compact work/cache --apply
    """
    from jobs.cache_compact import run_compact
    from jobs.cache_open import open_place

    opened = open_place(cache, signs=apply)
    _print(run_compact(opened, cache, apply=apply, grace_days=grace_days), as_json)


@app.command()
def lineage(
    what: Annotated[
        str,
        typer.Argument(
            help="Folder or digest of an adapter; name or id of a run; digest of a manifest; a clip by name, path or "
            "SHA-256."
        ),
    ],
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Where to look; may be repeated. Else the caches of the jobs in --runs."),
    ] = None,
    runs: Runs = Path("work/runs"),
    first: Annotated[int, typer.Option(min=1, help="So many names of clips are shown.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Show which clips an adapter has seen, by which run and manifest; or which adapters have seen a clip.

    crab cache lineage train-shapes

    crab cache lineage clips/00001.mp4 --cache s3://bucket/features
    """
    from jobs import cache_lineage
    from jobs.cache_open import open_place
    from jobs.spec_errors import SpecError

    opened = []
    for place in cache or cache_lineage.caches_of_runs(runs):
        try:
            opened.append(open_place(place))
        except SpecError:
            if cache:
                raise
            continue  # the cache of an old run, deleted since
    found = cache_lineage.lineage(what, opened, runs, first)
    if not as_json:
        cache_lineage.show(found)
    _print(cache_lineage.record(found), as_json)


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
