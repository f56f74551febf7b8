"""The command line: `crab`. Each command is a few lines around one call from Python."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jobs import cli_cache, cli_cluster

app = typer.Typer(
    name="crab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Clips become features, features become an adapter, the adapter is judged.

    A first tour, from an empty folder to a page with scores and examples of all nine tasks:

      crab synth work/shapes --clips 200 --seed 1     make clips with exact labels

      crab run jobs/specs/preprocess-shapes.yaml      decode, encode, cache

      crab run jobs/specs/train-shapes.yaml           fine-tune on the cached features

      crab run jobs/specs/evaluate-shapes.yaml        score against the best constant answer

      crab report evaluate-shapes                     a page to open in a browser

    Before the second, and whenever you change a spec: crab plan SPEC says what is cached and why the rest is not.

    Which settings are best: crab run jobs/specs/tune-heads.yaml searches them (docs/tuning.md).

    The same, larger and in one command: crab run jobs/specs/nine-tasks-tiny.yaml (under 45 minutes on 2 cores).

    Real data: crab import ave /data/AVE work/ave makes samples of an official data set.

    Exit codes: 0 done, 1 the work failed, 2 wrong input, 3 cannot reach something, 130 stopped by Ctrl-C.
    """,
)

app.add_typer(cli_cache.app)
app.add_typer(cli_cluster.app)  # without a name: its commands stand beside those here

AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="New folder for the clips, or one to be completed.")],
    clips: Annotated[int, typer.Option(min=1, help="How many clips of 10 s.")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, help="Same seed, same pixels, sounds and samples.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Make AV-Shapes: coloured shapes that move and sound, with exact samples for all nine tasks.

    Writes OUT/clips/*.mp4, OUT/masks/CLIP/SECOND.png and OUT/samples.jsonl. Started again it only makes what is
    missing. Four of five clips are for training, the others for testing.
    """
    from crab.synth.dataset import synthesise

    path = synthesise(out, clips, seed)
    _finish({"samples": str(path), "clips": clips}, as_json, f"wrote {path}")


@app.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(help="ave, llp, avsbench, ref-avs, music-avqa, valor or av-uie.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The data set as its authors lay it out.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for samples.jsonl.")],
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Read so many rows of each annotation file, to try it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make samples of an official data set on disk.

    Annotation files are found anywhere below DIR by their official names; media and masks stay where they are and may
    be missing. Rows that do not fit are in OUT/problems.jsonl with file and line. docs/datasets.md says where each data
    set is to be had, and how it must lie.
    """
    from jobs.importer import import_dataset
    from jobs.output import line, table

    try:
        result = import_dataset(source, folder, out, limit)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        _fail(str(error), 2)
    rows = result["table"]
    if rows:
        table(f"{source}: {result['out']}", list(rows[0]), [list(row.values()) for row in rows])
    for note in result["notes"]:
        line(note)
    if result["replaced"]:
        line(f"replaced the samples that an import of the same folder had left in {out}")
    if result["problems"] or result["left_out"] or result["duplicates"]:
        line(
            f"{result['problems']} rows do not fit, {result['left_out']} give no sample, {result['duplicates']} say "
            f"nothing new: {out / 'problems.jsonl'} has each of them"
        )
    _finish(result, as_json, f"wrote {result['samples']} samples of {result['rows']} rows")


@app.command()
def plan(
    spec: Annotated[Path, typer.Argument(help="A YAML file; those shipped are in jobs/specs/.")],
    profile: Annotated[
        str | None,
        typer.Option(help="Also in money: name of a profile in k8s/profiles, or its file."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Change one value of the spec, as in run."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Name so many of the clips that are no hits.")
    ] = 10,
    hashed: Annotated[
        bool,
        typer.Option(
            "--hash", help="Read and hash files that the cache does not know, to be sure of them."
        ),
    ] = False,
    clips_to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every clip with its fate to a new file, a line of JSON each.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a job would do and cost, before it runs. Touches nothing.

    For every clip and stream: a hit, a miss or set aside. Of each miss why: which part of the key differs, and from
    which earlier run. Then bytes to read and write, CPU, GPU and wall time from what earlier runs measured, money, and
    whether the cache pays at all. What was never measured is called unknown.

    Of a train job: whether its features are there, and what each of 1, 2, 4 ... workers needs in memory. That is from
    configurations alone; no weights are read. Of a tune job also how many steps it trains at the most.

      crab plan jobs/specs/preprocess-shapes.yaml --profile laptop

      crab plan jobs/specs/preprocess-shapes.yaml --set encoders.store_as=float32
    """
    from jobs.plan import plan_spec
    from jobs.spec import load_spec

    result = plan_spec(
        load_spec(spec, changes or []),
        profile=profile,
        hashed=hashed,
        limit=limit,
        clips_to=clips_to,
    )
    _finish(result, as_json)


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="A YAML file; those shipped are in jobs/specs/.")],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=VALUE",
            help="Change one value of the spec; may be repeated. In a sequence: steps.NAME.B=VALUE.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job here, on local Ray or on the Ray cluster that RAY_ADDRESS names.

    A spec says what to do: synth, preprocess, train, tune, evaluate, report, pretrain, or a sequence of these. A job
    that was killed is started again with the same command: what was done is not done again.
    """
    from jobs.run import run_spec
    from jobs.spec import load_spec

    # Ray tells of a worker that died on standard output, which is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = run_spec(load_spec(spec, changes or []))
        except KeyboardInterrupt:
            _fail("stopped. The same command goes on from the last commit or checkpoint", 130)
    _finish(result, as_json)


@app.command()
def report(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name of a finished evaluate job.")],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("work/runs"),
    examples: Annotated[int, typer.Option(min=1, help="How many of each task.")] = 6,
    as_json: AsJson = False,
) -> None:
    """Make a page of an evaluation: scores beside baselines, and examples of each task, the worst first.

    Frames with predicted and true masks and boxes, timelines of predicted and true events, question, reasoning, answer,
    and the sound. Opens in any browser, without a server and without a network.
    """
    from jobs.report import make_report

    path = make_report(name, str(runs), examples)
    _finish({"report": str(path)}, as_json, f"wrote {path}")


@app.command()
def predict(
    adapter: Annotated[
        Path, typer.Option(help="Folder of an exported adapter, or the name of a train job.")
    ],
    media: Annotated[list[str], typer.Argument(help="Clips: files or URLs.")],
    task: Annotated[
        str, typer.Option(help="ave, avvp, arig, s4, ms3, avss, ref-avs, avqa or avcap.")
    ],
    question: Annotated[
        str | None,
        typer.Option(
            help="What to ask (avqa), what to look for (ref-avs), the second to look at (arig); none for others."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for a page that shows each clip with its answer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask an adapter about any clip. Nothing is cached."""
    from jobs.predict import predict_media

    answers = predict_media(adapter, media, task, question, out=out)
    if as_json:
        print(json.dumps(answers))
    for answer in () if as_json else answers:
        print(f"{answer['media']}: {answer.get('text') or 'set aside: ' + str(answer['problem'])}")
        if answer.get("without"):
            print(
                f"  (it has no {' and no '.join(answer['without'])}; what is said of that is invented)"
            )
        if "text" in answer and answer["answer"] is None:
            print("  (not an answer in the task's grammar; it would count as wrong)")
    if all("text" not in answer for answer in answers):
        raise typer.Exit(1)
    if out is not None and not as_json:
        print(f"wrote {out / 'index.html'}")


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of all runs.")] = Path(
        "work/runs"
    ),
    give_up_s: Annotated[
        float, typer.Option(min=0, help="So long a server that does not answer is tried.")
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Send to MLflow what it was not there to take: metrics, files and states of runs, each once.

    A job whose server is down goes on and keeps what it logs in FOLDER/tracking; its next start sends that too. Exit
    code 3 when a server does not answer; then nothing is lost, come again.

      crab replay work/runs/train-shapes
    """
    from jobs.replay import replay as run_replay

    result = run_replay(folder, give_up_s)
    left = len(result["left"])
    _finish(result, as_json, f"{result['delivered']} records delivered, {left} runs left")
    if left:
        raise typer.Exit(3)


@app.command()
def doctor(
    cache: Annotated[
        str | None, typer.Option(help="Also test this cache, a folder or s3://bucket/prefix.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Check this profile's cluster instead: its API, KubeRay, rights, bucket."
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="With --profile: a context of KUBECONFIG.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that every part works on this machine: decoders, encoders, Ray, DeepSpeed, MLflow, the store.

    With --profile instead whether its cluster can take a job: a line a part, each with the way out.
    """
    from jobs.doctor import check_all, show

    if profile is None:
        results = check_all(cache)
    else:
        from jobs.doctor_cluster import check_cluster

        results = check_cluster(profile, context)
    if as_json:
        print(json.dumps([result.__dict__ for result in results]))
    else:
        show(results)
    if any(not result.ok for result in results):
        raise typer.Exit(3)


def _finish(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    if as_json:
        print(json.dumps(result))
    elif text:
        print(text)


def _quieten() -> None:
    """Libraries' notes about themselves would hide what we say. Their warnings and errors still come through."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    # This process never trains, it starts workers that do; asked here, DeepSpeed looks for a GPU and complains.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|peft)\.")
    for name in ("mlflow", "alembic", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    """Entry point: turns known errors into one message and an exit code."""
    # Imports and manifests make millions of objects that live on; looking through them for cycles every 700 new ones
    # took a sixth of a warm run of 10,000 clips.
    gc.set_threshold(100_000, 50, 100)
    _quieten()
    from crab_platform.cache import PublishTooSlow
    from crab_platform.catalog import CorruptManifest
    from crab_platform.cluster_errors import ClusterRefused, ClusterUnreachable
    from crab_platform.garbage import CollectionRuns
    from crab_platform.guards import SkippedTooOftenError
    from crab_platform.holding import FeaturesGone
    from crab_platform.leases import LeaseLost
    from crab_platform.notice import Stopped
    from crab_platform.packs import CorruptEntry
    from crab_platform.storage import StoreError, StoreUnreachable
    from jobs.run import JobFailed

    told_by_the_cache = (
        CollectionRuns,
        CorruptEntry,
        CorruptManifest,
        FeaturesGone,
        LeaseLost,
        PublishTooSlow,
    )

    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except typer.TyperException as error:
        message = str(error) or "which command?"
        _fail(f"{message}\nSee crab --help, or crab COMMAND --help.", 2)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except typer.Abort:
        _fail("stopped", 130)
    except KeyboardInterrupt:
        _fail("stopped; start the same command again to continue", 130)
    except Stopped as stopped:
        _fail(str(stopped), 143)
    except (StoreUnreachable, ClusterUnreachable) as error:
        _fail(str(error), 3)
    except SkippedTooOftenError as error:
        _fail(str(error), 4)
    except (JobFailed, StoreError, ClusterRefused, *told_by_the_cache) as error:
        _fail(str(error), 1)
    except ValueError as error:  # also SpecError: what the user gave is wrong
        _fail(str(error), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"crab: {message}", file=sys.stderr)
    sys.exit(code)
