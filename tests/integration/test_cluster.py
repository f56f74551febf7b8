"""Jobs on a cluster, by real requests to an API server on loopback (tests/servers/kube_api_server.py)."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from servers.kube_api_server import Fault, KubeServer, kube_api_server
from support.kube import NAMESPACE, QUICK, VERBS, api_of, job, names, race, survive

from crab_platform import cluster
from crab_platform.cluster import AnotherJob, JobState, state_of
from crab_platform.cluster_errors import ClusterRefused, ClusterUnreachable
from crab_platform.kube_api import KubeApi, Patience


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


def test_a_job_is_submitted_found_and_stopped(server: KubeServer) -> None:
    api, body = api_of(server), job()
    name = body["metadata"]["name"]
    assert cluster.submit(api, body) is True
    assert [r.query.get("dryRun") for r in server.requests] == ["All", None]
    assert server.get("rayjobs", NAMESPACE, name)["spec"] == body["spec"]
    assert cluster.submit(api, body) is False, "the same submission is the same job"
    assert [found["metadata"]["name"] for found in cluster.jobs(api)] == names(server) == [name]
    assert cluster.stop(api, name) is True
    assert cluster.stop(api, name) is False
    assert names(server) == []


def test_another_job_of_the_name_is_not_taken_for_this_one(server: KubeServer) -> None:
    api, body = api_of(server), job()
    cluster.submit(api, body)
    body["metadata"]["annotations"]["crab/digest"] = "other"
    with pytest.raises(AnotherJob, match="crab stop"):
        cluster.submit(api, body)


def test_an_object_that_the_server_does_not_know_is_refused_before_it_is_made(
    server: KubeServer,
) -> None:
    body = job()
    body["spec"]["entrypiont"] = "true"
    with pytest.raises(ClusterRefused, match="entrypiont"):
        cluster.submit(api_of(server), body)
    assert [r.query.get("dryRun") for r in server.requests] == ["All"]


def test_an_expired_token_is_renewed_once(server: KubeServer) -> None:
    assert cluster.submit(api_of(server, tokens=["expired", "token"]), job())
    with pytest.raises(ClusterRefused, match=r"401.*log in again"):
        cluster.jobs(api_of(server, tokens=["expired"]))
    assert len(server.requests) == 3 + 2


@pytest.mark.parametrize(
    ("fault", "verb"), list(itertools.product([429, 503, "reset", "cut"], VERBS))
)
def test_every_request_survives_a_fault(server: KubeServer, fault: Fault, verb: str) -> None:
    """The quick half of F1; tests/faults/test_kube_requests.py has the whole."""
    survive(server, fault, verb)


def test_no_call_lasts_for_more_than_30_s() -> None:
    patience = Patience()
    assert patience.watch_s + patience.read_s <= 30
    assert patience.connect_s + patience.read_s <= 30


def test_a_server_that_never_answers_is_given_up_and_says_so(server: KubeServer) -> None:
    for fault in (503, "reset"):
        server.requests.clear()
        server.spoil = lambda _verb, _path, fault=fault: fault
        with pytest.raises(ClusterUnreachable, match=r"6 tries.*kubectl get rayjobs -n crab"):
            cluster.jobs(api_of(server))
        assert len(server.requests) == QUICK.tries
    server.spoil = lambda _verb, _path: 403
    server.requests.clear()
    with pytest.raises(ClusterRefused, match="kubectl auth can-i"):
        cluster.jobs(api_of(server))
    assert len(server.requests) == 1, "what is forbidden stays forbidden"


def test_a_lost_answer_never_makes_two_jobs(server: KubeServer) -> None:
    """F2, its part without a kill: created, and nobody knows."""
    left = ["lose"]
    server.spoil = lambda verb, path: (
        left.pop() if verb == "create" and "dryRun" not in path and left else "pass"
    )
    assert cluster.submit(api_of(server), job()) is False, "it was found to be there"
    assert len(names(server)) == 1


def test_two_who_submit_the_same_make_one_job(server: KubeServer) -> None:
    race(server, 10)


def follow(api: KubeApi, name: str) -> list[JobState]:
    return list(cluster.follow(api, name))


def test_a_watch_survives_cuts_and_a_forgotten_past(server: KubeServer) -> None:
    """F4: 1,000 events, 50 cuts and 5 times 410; the last word is the server's, and there is a LIST for each 410."""
    api, body = api_of(server), job()
    name = body["metadata"]["name"]
    server.create("rayjobs", NAMESPACE, body)
    watches = itertools.count()

    def spoil(verb: str, _path: str) -> Fault:
        return (
            "cut"
            if verb == "watch" and next(watches) % 2 == 0 and cuts.acquire(blocking=False)
            else "pass"
        )

    cuts = threading.Semaphore(50)
    server.spoil = spoil
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow, api, name)
        for number in range(1000):
            server.set_status(
                "rayjobs", NAMESPACE, name, jobDeploymentStatus="Running", message=str(number)
            )
            if number % 200 == 100:
                server.forget()
            if number % 10 == 0:
                time.sleep(0.01)
        server.set_status(
            "rayjobs", NAMESPACE, name, jobDeploymentStatus="Failed", reason="DeadlineExceeded"
        )
        seen = following.result()
    assert seen[-1].phase == "failed"
    assert "DeadlineExceeded" in seen[-1].sentence
    verbs = Counter(request.verb for request in server.requests if request.resource == "rayjobs")
    assert verbs["list"] <= 1 + 5
    assert verbs["watch"] > 5, "nothing was cut"


def test_a_silent_server_makes_a_state_unknown_and_no_crash(server: KubeServer) -> None:
    """F5: the server is silent, and comes back."""
    api, body = api_of(server), job()
    name = body["metadata"]["name"]
    server.create("rayjobs", NAMESPACE, body)
    states = cluster.follow(api, name)
    assert next(states).phase == "waiting"
    server.spoil = lambda _verb, _path: "stall"
    unknown = next(states)
    assert unknown.phase == "unknown"
    assert "unknown since 20" in unknown.sentence
    server.spoil = lambda _verb, _path: "pass"
    server.set_status("rayjobs", NAMESPACE, name, jobStatus="SUCCEEDED")
    assert [state.phase for state in states] == ["succeeded"]

    server.spoil = lambda _verb, _path: "reset"
    with pytest.raises(ClusterUnreachable):
        list(cluster.follow(api, name, silence_s=0))


def test_a_job_that_vanishes_is_said_to_be_gone(server: KubeServer) -> None:
    api, body = api_of(server), job()
    name = body["metadata"]["name"]
    with pytest.raises(ClusterRefused, match="gone"):
        follow(api, name)
    server.create("rayjobs", NAMESPACE, body)
    states = cluster.follow(api, name)
    assert next(states).phase == "waiting"
    server.delete(("rayjobs", NAMESPACE, name))
    with pytest.raises(ClusterRefused, match="somebody has deleted it"):
        next(states)


@pytest.mark.parametrize(
    ("status", "phase", "said", "code"),
    [
        ({}, "waiting", "KubeRay has not looked", None),
        ({"jobDeploymentStatus": "Initializing"}, "waiting", "cluster is started", None),
        ({"jobDeploymentStatus": "Suspended"}, "suspended", "queue", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, "running", "running", None),
        ({"jobDeploymentStatus": "Retrying"}, "waiting", "new cluster", None),
        # What KubeRay 1.7 writes between an attempt that failed and the next one.
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "reason": "App"}, "waiting", "App", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, "running", "whether", None),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "succeeded", "done", 0),
        ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, "succeeded", "done", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED", "message": "exit 1"}, "failed", "exit 1", 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "failed", "STOPPED", 1),
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, "failed", "PreRunning", 1),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "Deadline"}, "failed", "Deadline", 1),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, "failed", "no", 1),
    ],
)  # fmt: skip
def test_a_status_means(status: dict[str, Any], phase: str, said: str, code: int | None) -> None:
    state = state_of(job() | {"status": status})
    assert (state.phase, state.exit_code) == (phase, code)
    assert said in state.sentence
