"""A client of ours for a server of tests, jobs for it, and what must hold whatever happens to requests."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client
from servers.kube_api_server import Fault, KubeServer

from crab_platform import cluster
from crab_platform.cluster_profile import load_cluster
from crab_platform.kube_api import KubeApi, Patience
from crab_platform.rayjob import GroupNeed, JobRequest, ray_job

NAMESPACE = "crab"
QUICK = Patience(connect_s=1, read_s=1, pause_s=0.01, longest_pause_s=0.05, watch_s=1)


def api_of(
    server: KubeServer, patience: Patience = QUICK, tokens: list[str] | None = None
) -> KubeApi:
    """`tokens`: one for each time that a client is made; the last one from then on."""
    left = list(tokens or ["token"])

    def connect() -> client.ApiClient:
        settings = client.Configuration()
        settings.host = server.endpoint
        settings.api_key = {"authorization": f"Bearer {left.pop(0) if len(left) > 1 else left[0]}"}
        return client.ApiClient(settings)

    return KubeApi(connect=connect, namespace=NAMESPACE, patience=patience)


def write_kubeconfig(server: KubeServer, path: Path) -> Path:
    """For a command that is run as a person runs it."""
    record = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server.endpoint}}],
        "users": [{"name": "u", "user": {"token": "token"}}],
    }
    path.write_text(yaml.safe_dump(record))
    return path


def job(name: str = "train", spec: str = "{}") -> dict[str, Any]:
    _, profile, _ = load_cluster("eks-example")
    request = JobRequest(
        name=name,
        kind="train",
        spec=spec,
        needs=[GroupNeed(group="cpu", pods=1)],
        version="1",
    )
    return ray_job(request, profile)


def names(server: KubeServer) -> list[str]:
    """Of all RayJobs."""
    return [found["metadata"]["name"] for found in server.all("rayjobs")]


VERBS = "get", "list", "create", "delete", "watch"
FAULTS: list[Fault] = [429, 500, 502, 503, 504, "reset", "stall", "cut"]


def _do(api: KubeApi, verb: str, server: KubeServer) -> None:
    """A command that needs this verb, and what must be so afterwards."""
    body = job()
    name = body["metadata"]["name"]
    if verb == "create":
        cluster.submit(api, body)
        assert names(server) == [name]
        return
    server.create("rayjobs", NAMESPACE, body)
    if verb == "get":
        assert cluster.get(api, name)["metadata"]["name"] == name
    elif verb == "list":
        assert len(cluster.jobs(api)) == 1
    elif verb == "delete":
        assert cluster.stop(api, name) in (
            True,
            False,
        )  # False where the answer to the first try was lost
        assert names(server) == []
    else:
        seen = []
        for state in cluster.follow(api, name):
            seen.append(state.phase)
            if len(seen) == 1:
                server.set_status("rayjobs", NAMESPACE, name, jobStatus="SUCCEEDED")
        assert seen == ["waiting", "succeeded"]


def survive(server: KubeServer, fault: Fault, verb: str) -> None:
    """Two faults in a row, then none."""
    left = [fault, fault]
    server.spoil = lambda asked, _path: left.pop() if asked == verb and left else "pass"
    _do(api_of(server), verb, server)
    assert left == [], "the fault did not happen"
    tries = Counter(request.verb for request in server.requests)[verb]
    # A watch ends by itself as well, while the job goes on.
    assert tries <= (6 if verb != "watch" else 10)


def race(server: KubeServer, rounds: int) -> None:
    """Two submit the same at once, so many times."""
    with ThreadPoolExecutor(2) as pool:
        for number in range(rounds):
            body = job(spec=f'{{"n": {number}}}')
            made = [pool.submit(cluster.submit, api_of(server), body) for _ in range(2)]
            assert sorted(future.result() for future in made) == [False, True]
    assert len(names(server)) == rounds
