"""What KubeRay does for a RayJob, on this machine: a Ray cluster of real processes, and the job by Ray's API.

It reads and writes the objects of kube_api_server.py, as the operator does those of Kubernetes. Of a pod it takes over
environment (Secrets and labels resolved), CPUs, working directory and command; not image, limits of memory, or network.
Retries are new clusters; deadlines, clean-up and deletion are KubeRay's (1.7).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from servers.kube_api_server import KubeServer, Refused
from servers.seaweedfs import free_ports

Object = dict[str, Any]
TOKEN_KEY = "auth_token"
_POLL_S = 0.2
_SILENCE_S = 30.0
"""KubeRay's RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS, which is 300 there."""
_END = {"SUCCEEDED", "FAILED", "STOPPED"}


class _Gone(Exception):  # noqa: N818 (what happened)
    """The RayJob was deleted."""


class _TooLate(Exception):  # noqa: N818 (what happened)
    """A deadline is over."""


class Operator:
    """Use `operator`."""

    def __init__(self, server: KubeServer, folder: Path, environment: Mapping[str, str]) -> None:
        self._server = server
        self._folder = folder
        self._environment = dict(environment)
        self._threads: dict[str, threading.Thread] = {}
        self._is_over = threading.Event()
        self.errors: list[BaseException] = []

    @property
    def workspace(self) -> Path:
        """What is mounted as work/ of every pod."""
        return self._folder / "work"

    def run(self) -> None:
        while not self._is_over.wait(_POLL_S):
            for job in self._server.all("rayjobs"):
                uid = job["metadata"]["uid"]
                if uid not in self._threads and not job["spec"].get("suspend"):
                    thread = threading.Thread(target=self._look_after, args=(job,), daemon=True)
                    self._threads[uid] = thread
                    thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads.values():
            thread.join()

    def _look_after(self, job: Object) -> None:
        try:
            self._all_attempts(job)
        except _Gone:
            return
        except (
            BaseException
        ) as error:  # told to the test by `operator`, and to who waits for the job
            self.errors.append(error)
            said = f"the operator of the tests failed: {error!r}"
            with suppress(_Gone):
                self._say(
                    job, jobDeploymentStatus="Failed", reason="ValidationFailed", message=said
                )

    def _all_attempts(self, job: Object) -> None:
        spec = job["spec"]
        until = time.monotonic() + spec.get("activeDeadlineSeconds", 1 << 30)
        failed = 0
        while True:
            with RayPods(self._server, job, self._folder, self._environment) as cluster:
                status = self._attempt(job, cluster, until)
                has_failed = status["jobDeploymentStatus"] == "Failed"
                failed += has_failed
                again = has_failed and failed < spec["backoffLimit"] + 1
                if again and status["reason"] != "DeadlineExceeded":
                    status["jobDeploymentStatus"] = (
                        "Retrying"  # in place of Failed, which nobody sees
                    )
                self._say(job, **status, failed=failed, succeeded=int(not has_failed))
                if status["jobDeploymentStatus"] != "Retrying":
                    self._say(job, endTime=_now())
                    self._wait(job, spec.get("ttlSecondsAfterFinished", 0))
                    break
            self._say(job, jobDeploymentStatus="", jobStatus="", rayClusterName="", reason="")

    def _attempt(self, job: Object, cluster: RayPods, until: float) -> Object:
        """The status at its end."""
        spec = job["spec"]
        self._say(
            job, jobDeploymentStatus="Initializing", jobStatus="", rayClusterName=cluster.name
        )
        begun = time.monotonic()
        try:
            cluster.start()
            while not cluster.is_ready():
                self._look(job, until)
                if time.monotonic() > begun + spec.get("preRunningDeadlineSeconds", 1 << 30):
                    return {"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}
                time.sleep(_POLL_S)
            identity = f"{job['metadata']['name']}-{secrets.token_hex(3)}"
            while not cluster.submit(identity, spec["entrypoint"], spec.get("runtimeEnvYAML")):
                self._look(job, until)
                time.sleep(_POLL_S)
            times = {"startTime": _now()}
            self._say(job, jobDeploymentStatus="Running", jobStatus="PENDING", jobId=identity)
            heard = time.monotonic()
            while True:
                self._look(job, until)
                found = cluster.job(identity)
                if found is None and time.monotonic() - heard < _SILENCE_S:
                    time.sleep(_POLL_S)
                    continue
                heard = time.monotonic()
                if found is None:
                    reason = "JobStatusCheckTimeoutExceeded"
                    return {
                        "jobDeploymentStatus": "Failed",
                        "jobStatus": "FAILED",
                        "reason": reason,
                    }
                state, message = found["status"], found.get("message") or ""
                if state in _END:
                    break
                self._say(job, jobStatus=state, message=message, rayJobInfo=times)
                time.sleep(_POLL_S)
        except _TooLate:
            return {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}
        status = {"jobStatus": state, "message": message, "rayJobInfo": times | {"endTime": _now()}}
        if state == "SUCCEEDED":
            return status | {"jobDeploymentStatus": "Complete"}
        return status | {"jobDeploymentStatus": "Failed", "reason": "AppFailed"}

    def _look(self, job: Object, until: float) -> None:
        if self._is_over.is_set() or not self._is_there(job):
            raise _Gone
        if time.monotonic() > until:
            raise _TooLate

    def _wait(self, job: Object, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._is_there(job) and not self._is_over.is_set():
            time.sleep(_POLL_S)

    def _is_there(self, job: Object) -> bool:
        metadata = job["metadata"]
        with suppress(Refused):
            found = self._server.get("rayjobs", metadata["namespace"], metadata["name"])
            return bool(found["metadata"]["uid"] == metadata["uid"])
        return False

    def _say(self, job: Object, **status: Any) -> None:
        metadata = job["metadata"]
        try:
            self._server.set_status("rayjobs", metadata["namespace"], metadata["name"], **status)
        except Refused as refused:
            raise _Gone from refused


class RayPods:
    """Ray processes for a RayCluster and its pods; gone at the end of the block."""

    def __init__(
        self, server: KubeServer, job: Object, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._server = server
        self._job = job
        self._spec = job["spec"]["rayClusterSpec"]
        self._namespace = job["metadata"]["namespace"]
        self.name = f"{job['metadata']['name']}-{secrets.token_hex(3)}"
        self._folder = folder
        self._own = folder / self.name[-6:]  # short: Ray's sockets lie in it
        self._environment = dict(environment)
        self._pods: dict[str, subprocess.Popen[bytes]] = {}
        self._port, self._dashboard = free_ports(2)
        self._token = ""

    def __enter__(self) -> RayPods:
        return self

    @property
    def dashboard(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._dashboard}"

    def start(self) -> None:
        """Returns when the head answers."""
        self._make("rayclusters", "ray.io/v1", "RayCluster", self.name, {}, self._spec)
        self._start_pod(f"{self.name}-head", self._spec["headGroupSpec"], head=True)
        self._wait_until(lambda: self._ask("GET", "/api/version") is not None)

    def is_ready(self) -> bool:
        """Whether all nodes are there. Starts the next one: two at a time on one machine take each other's ports."""
        assert self._is_alive(), "a Ray process has ended"
        nodes = self._ask("GET", "/nodes?view=summary")
        states = [node["raylet"].get("state") for node in nodes["data"]["summary"]] if nodes else []
        if states.count("ALIVE") < len(self._pods):
            return False
        for group in self._spec["workerGroupSpecs"]:
            # Without an autoscaler here, groups that scale have all of their pods at once.
            for number in range(group["maxReplicas"]):
                name = f"{self.name}-{group['groupName']}-{number}"
                if name not in self._pods:
                    self._start_pod(name, group, head=False)
                    return False
        return True

    def submit(self, identity: str, entrypoint: str, runtime_env: str | None) -> bool:
        """Whether Ray has taken it: its agents may not be there yet, and the same identity is one job."""
        body = {"entrypoint": entrypoint, "submission_id": identity}
        if runtime_env:
            body["runtime_env"] = json.loads(runtime_env)
        return self._ask("POST", "/api/jobs/", body) is not None or self.job(identity) is not None

    def job(self, identity: str) -> Object | None:
        """As Ray has it; None where its head is gone."""
        return self._ask("GET", f"/api/jobs/{identity}")

    def __exit__(self, *_: object) -> None:
        _kill(self._pods.values())
        for name in self._pods:
            with suppress(Refused):
                self._server.delete(("pods", self._namespace, name))
        with suppress(Refused):
            self._server.delete(("rayclusters", self._namespace, self.name))
        shutil.rmtree(self._own, ignore_errors=True)

    def _is_alive(self) -> bool:
        return all(pod.poll() is None for pod in self._pods.values())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self._is_alive(), "a Ray process has ended"
            time.sleep(_POLL_S)

    def _start_pod(self, name: str, group: Object, *, head: bool) -> None:
        template = group["template"]
        (container,) = template["spec"]["containers"]
        labels = template["metadata"].get("labels", {}) | {
            "ray.io/cluster": self.name,
            "ray.io/node-type": "head" if head else "worker",
            "ray.io/group": "headgroup" if head else group["groupName"],
        }
        self._make("pods", "v1", "Pod", name, labels, template["spec"])
        # As in pods, all stand in folders of one name, and have homes of their own.
        (self._folder / "work").mkdir(exist_ok=True)
        home = self._own / name
        home.mkdir(parents=True)
        variables = self._variables(container["env"], labels)
        environment = self._environment | variables | {"HOME": str(home)}
        auth = self._spec["authOptions"]
        environment["RAY_AUTH_MODE"] = auth["mode"]
        if auth["mode"] == "token":
            self._token = self._secret(auth["secretName"], TOKEN_KEY)
            environment["RAY_AUTH_TOKEN"] = self._token
        environment["RAY_TMPDIR"] = str(self._own)
        cpus = group["rayStartParams"].get("num-cpus", container["resources"]["limits"]["cpu"])
        # Pods have a network of their own, these have not: another Ray on this machine has the usual ports.
        agent, client = free_ports(2)
        ports = [f"--port={self._port}", f"--dashboard-port={self._dashboard}"]
        ports.append(f"--ray-client-server-port={client}")
        where = ["--head", *ports] if head else [f"--address=127.0.0.1:{self._port}"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *where]
        command += [f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
        command.append(f"--dashboard-agent-listen-port={agent}")
        command += [f"--object-store-memory={200 << 20}"]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._pods[name] = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        state = {"name": container["name"], "state": {"running": {}}}
        self._server.set_status(
            "pods", self._namespace, name, phase="Running", containerStatuses=[state]
        )

    def _variables(self, env: list[Object], labels: Mapping[str, str]) -> dict[str, str]:
        found = {}
        for variable in env:
            if "value" in variable:
                found[variable["name"]] = variable["value"]
            elif "fieldRef" in variable["valueFrom"]:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                found[variable["name"]] = labels[path.removeprefix("metadata.labels['")[:-2]]
            else:
                reference = variable["valueFrom"]["secretKeyRef"]
                found[variable["name"]] = self._secret(reference["name"], reference["key"])
        return found

    def _secret(self, name: str, key: str) -> str:
        return str(self._server.get("secrets", self._namespace, name)["stringData"][key])

    def _make(
        self, plural: str, api: str, kind: str, name: str, labels: Mapping[str, str], spec: Object
    ) -> None:
        owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": self._job["metadata"]["name"]}
        owner["uid"] = self._job["metadata"]["uid"]
        metadata = {"name": name, "labels": dict(labels), "ownerReferences": [owner]}
        body = {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec}
        self._server.create(plural, self._namespace, body)

    def _ask(self, method: str, path: str, body: Object | None = None) -> Object | None:
        request = urllib.request.Request(
            self.dashboard + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: Object = json.loads(answer.read())
                return found
        except (urllib.error.URLError, OSError):
            return None


def bare_environment() -> dict[str, str]:
    """As in a container: nothing of who runs the tests, above all no key."""
    own = {name: os.environ[name] for name in ("LANG", "OMP_NUM_THREADS") if name in os.environ}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return own


@contextmanager
def operator(
    server: KubeServer, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Operator]:
    """Looks after all RayJobs of a server; `environment` is added to that of every pod."""
    found = Operator(server, folder, bare_environment() | dict(environment or {}))
    thread = threading.Thread(target=found.run, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.stop()
        thread.join()
    assert not found.errors, found.errors


def _kill(pods: Iterable[subprocess.Popen[bytes]]) -> None:
    """With all that they have started."""
    of_them = [own for pod in pods for own in _family(pod.pid)]
    for process in of_them:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(of_them, timeout=3)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left)


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
