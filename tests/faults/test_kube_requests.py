"""F1 to F3 of reference/reliability.md: requests to Kubernetes under every fault, submitters killed and racing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.kube_api_server import Fault, KubeServer, kube_api_server
from support.kube import FAULTS, NAMESPACE, VERBS, job, names, race, survive

pytestmark = pytest.mark.faults

KILLS = 100
_SUBMITTER = """
import json, sys
from kubernetes import client
from crab_platform import cluster
from crab_platform.kube_api import KubeApi

def connect():
    settings = client.Configuration()
    settings.host = sys.argv[1]
    settings.api_key = {"authorization": "Bearer token"}
    return client.ApiClient(settings)

print(cluster.submit(KubeApi(connect=connect, namespace=sys.argv[2]), json.loads(sys.argv[3])))
"""


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


@pytest.mark.parametrize(("fault", "verb"), list(itertools.product(FAULTS, VERBS)))
def test_every_request_survives_every_fault(server: KubeServer, fault: Fault, verb: str) -> None:
    """F1, for the five verbs that we use: 40 cells."""
    survive(server, fault, verb)


def test_submitters_that_are_killed_never_make_two_jobs(
    server: KubeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """F2: killed before the request is sent on, or when the job is made and the answer is not there; then once more."""
    made_by_the_killed = 0
    for number in range(KILLS):
        body = job(spec=json.dumps({"n": number}))
        command = [sys.executable, "-c", _SUBMITTER, server.endpoint, NAMESPACE, json.dumps(body)]
        env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
        victim: list[int] = []
        started = threading.Event()

        def spoil(
            verb: str,
            path: str,
            *,
            victim: list[int] = victim,
            started: threading.Event = started,
            number: int = number,
        ) -> Fault:
            if verb != "create" or "dryRun" in path or not victim:
                return "pass"
            started.wait()
            os.kill(victim.pop(), signal.SIGKILL)
            return "reset" if number % 2 else "lose"

        server.spoil = spoil
        killed = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        victim.append(killed.pid)
        started.set()
        assert killed.wait() == -signal.SIGKILL
        made_by_the_killed += body["metadata"]["name"] in names(server)
        again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert again.stdout.strip() in ("True", "False")
    assert len(names(server)) == len(set(names(server))) == KILLS
    assert made_by_the_killed == KILLS // 2, "kills before and after the commit"
    with capsys.disabled():
        print(
            f"\nF2: {KILLS} submitters killed, {made_by_the_killed} after the commit; {KILLS} jobs"
        )


def test_two_who_submit_the_same_make_one_job(server: KubeServer) -> None:
    """F3: 100 times two at once."""
    race(server, 100)


def test_a_submitter_with_names_of_its_own_is_caught(server: KubeServer) -> None:
    """Teeth: with a name that is new for each try (planted), a lost answer makes two jobs."""
    left = ["lose"]
    server.spoil = lambda verb, path: (
        left.pop() if verb == "create" and "dryRun" not in path and left else "pass"
    )
    for _ in range(2):
        body = job()
        body["metadata"]["name"] += os.urandom(2).hex()
        subprocess.run(
            [sys.executable, "-c", _SUBMITTER, server.endpoint, NAMESPACE, json.dumps(body)],
            env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
            check=True,
            capture_output=True,
        )
    assert len(names(server)) == 2
