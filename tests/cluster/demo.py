"""`make demo-cluster`: from clips to scores by `crab submit`, on a cluster of real processes on this machine.

For Kubernetes and KubeRay stand the API server and the operator of the tests; the commands are the real ones.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from servers.seaweedfs import seaweedfs
from support.cluster_here import SPECS, Cluster, cluster_here
from support.crab_runs import CLI

CRDS = Path(__file__).parents[3] / "shared" / "kuberay"
SMALL_TRAIN = (
    "optimisation.steps=10",
    "optimisation.batch_size=4",
    "workers.micro_batches=1",
    "parse_rate_samples=1",
)


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="s3") as folder,
        seaweedfs(Path(folder)) as s3,
        cluster_here(CRDS if CRDS.is_dir() else None, s3) as cluster,
    ):
        features = f"features.cache={cluster.cache}"
        show(cluster, "synth", "work/shapes", "--clips", "10", "--seed", "1")
        show(cluster, *submit("preprocess-shapes", f"cache={cluster.cache}"))
        show(cluster, *submit("train-shapes", features, *SMALL_TRAIN))
        show(cluster, *submit("evaluate-shapes", features, "samples_per_task=1", "workers=1"))
        show(cluster, "jobs")
        print(f"\nRuns were tracked by {cluster.mlflow}. All of it is gone now.")


def submit(spec: str, *changes: str) -> list[str]:
    sets = [part for change in changes for part in ("--set", change)]
    return ["submit", str(SPECS / f"{spec}.yaml"), *sets]


def show(cluster: Cluster, *arguments: str) -> None:
    """Runs a command of crab and shows it. Ends the demo where it fails."""
    print(f"\n$ crab {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-c", CLI, *arguments]
    done = subprocess.run(command, env=cluster.env, cwd=cluster.operator.workspace.parent)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
