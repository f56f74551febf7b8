"""`crab submit | jobs | status | stop`: jobs on a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.cli_cache import AsJson

app = typer.Typer()

ClusterProfileOption = Annotated[
    str,
    typer.Option(
        "--profile",
        envvar="CRAB_PROFILE",
        help="Name of a profile in k8s/profiles that describes a cluster, or its file.",
    ),
]
ContextOption = Annotated[
    str | None, typer.Option(help="A context of KUBECONFIG; the current one when left out.")
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="As crab jobs lists it.")]


@app.command()
def submit(
    spec: Annotated[Path, typer.Argument(help="A YAML file; those shipped are in jobs/specs/.")],
    profile: ClusterProfileOption,
    context: ContextOption = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=VALUE", help="Change one value of the spec, as in run."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the RayJob as YAML and send nothing.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    code: Annotated[
        bool,
        typer.Option("--code", help="Take the code of this git checkout along, not the image's."),
    ] = False,
    dirty: Annotated[
        bool, typer.Option("--dirty", help="With --code: also what is not committed.")
    ] = False,
    misses: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of a preprocess job: streams not in the cache, as crab plan counts them. With 0 no GPU is asked for.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a spec on a cluster, as a RayJob (KubeRay), show its log and wait for its end.

    The job is checked against what KubeRay and Kueue refuse before anything is sent, and by the server before it is
    made. Its name holds a digest of all that is in it: the same command again finds the same job, and goes on waiting
    for it. Exit code 0 when it has succeeded, 1 when it has failed, 3 when the cluster does not answer.

      crab submit jobs/specs/train-shapes.yaml --profile eks-example --dry-run
    """
    from jobs import cluster_jobs
    from jobs.code_zip import pack, upload
    from jobs.output import line
    from jobs.submit import as_yaml, manifest_of

    if dirty and not code:
        raise typer.BadParameter("--dirty says what --code may take; give both")
    packed = pack(dirty=dirty) if code else None
    job = manifest_of(spec, changes or [], profile, misses=misses, code=packed)
    target = cluster_jobs.target_of(profile, context)
    if dry_run:
        line(f"it {cluster_jobs.rate(job, target.prices)}")
        _show(job, as_json, as_yaml(job).rstrip())
        return
    if packed is not None:
        upload(packed, target.bucket())
    _show(cluster_jobs.submit(target, job, detach=detach), as_json)


@app.command("jobs")
def jobs_(
    profile: ClusterProfileOption, context: ContextOption = None, as_json: AsJson = False
) -> None:
    """List the jobs of a profile's namespace: what each of them is doing, and what it costs."""
    from jobs import cluster_jobs

    found = cluster_jobs.show_jobs(cluster_jobs.target_of(profile, context))
    _show({"jobs": found}, as_json)


@app.command()
def status(
    name: JobName,
    profile: ClusterProfileOption,
    context: ContextOption = None,
    as_json: AsJson = False,
) -> None:
    """Say what a job is doing, and why it waits: no node, no image, no quota. The state is the API's, never a log's."""
    from jobs import cluster_jobs

    _show(cluster_jobs.show_status(cluster_jobs.target_of(profile, context), name), as_json)


@app.command()
def stop(
    name: JobName,
    profile: ClusterProfileOption,
    context: ContextOption = None,
    as_json: AsJson = False,
) -> None:
    """Stop a job and remove it with its cluster. What it has committed stays."""
    from jobs import cluster_jobs

    _show(cluster_jobs.stop(cluster_jobs.target_of(profile, context), name), as_json)


@app.command()
def logs(
    name: JobName,
    profile: ClusterProfileOption,
    context: ContextOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job is over.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a job has printed, each attempt after the other. From the bucket, also when its cluster is gone.

    The log is at most 15 s behind. Ray's own logs lie beside it, once an attempt is over: jobs/JOB/ATTEMPT/logs.zip.
    """
    from jobs import cluster_jobs, cluster_logs

    target = cluster_jobs.target_of(profile, context)
    bucket = target.bucket()
    if as_json:
        print(json.dumps({"name": name, "attempts": cluster_logs.logs(target.api, bucket, name)}))
        return

    def write(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()

    cluster_logs.show_logs(target.api, bucket, name, write, follow=follow)


@app.command(hidden=True)
def attempt(
    spec: Annotated[str, typer.Argument(help="As of crab run.")],
    bucket: Annotated[str, typer.Option(envvar="CRAB_BUCKET", help="Where the log goes.")],
    job: Annotated[str, typer.Option(envvar="CRAB_JOB", help="The RayJob.")],
    cluster: Annotated[str, typer.Option(envvar="CRAB_CLUSTER", help="Its Ray cluster.")],
    code: Annotated[
        str | None, typer.Option(envvar="CRAB_CODE", help="A zip in the bucket.")
    ] = None,
    client_version: Annotated[
        str | None, typer.Option(envvar="CRAB_CLIENT_VERSION", help="Of who submitted.")
    ] = None,
) -> None:
    """Run a spec as one attempt at a job on a cluster: what pods do, see jobs/attempt.py."""
    from jobs.attempt import attempt as run_attempt

    command = (sys.executable, "-c", "from jobs.cli import main; main()", "run", spec, "--json")
    sys.exit(
        run_attempt(
            command,
            bucket=bucket,
            job=job,
            cluster=cluster,
            code=code,
            client_version=client_version,
        )
    )


def _show(result: dict[str, Any], as_json: bool, text: str = "") -> None:
    if as_json:
        print(json.dumps(result))
    elif text:
        print(text)
