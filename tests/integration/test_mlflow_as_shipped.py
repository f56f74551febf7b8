"""E10 of reference/reliability.md: MLflow with the command and the secrets that k8s/ gives it lets nobody in.

Run here with SQLite and a folder in place of PostgreSQL and the bucket.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from servers.seaweedfs import free_ports
from support.kustomize import K8S, of_kind, pod_templates

from crab_platform import tracking
from crab_platform.delivery import deliver_folder
from crab_platform.spool import FOLDER

HOSTS = "crab-mlflow.crab.svc:5000,crab-mlflow.crab.svc"
SERVICE = "crab-mlflow.crab.svc:5000"
Credentials = tuple[str, str] | None


@dataclass(frozen=True)
class Shipped:
    url: str
    user: str
    password: str

    def ask(
        self,
        path: str,
        credentials: Credentials = None,
        host: str = SERVICE,
        method: str = "GET",
        body: bytes | None = None,
    ) -> int:
        """The status."""
        headers = {"Host": host, "Content-Type": "application/json"}
        if credentials is not None:
            token = base64.b64encode(":".join(credentials).encode()).decode()
            headers["Authorization"] = f"Basic {token}"
        request = urllib.request.Request(self.url + path, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def secret(overlay: str, name: str) -> dict[str, str]:
    done = subprocess.run(
        [str(K8S / "secrets.sh"), overlay], check=True, capture_output=True, text=True
    )
    made = {one["metadata"]["name"]: one["stringData"] for one in yaml.safe_load_all(done.stdout)}
    return {
        "user": made["crab-mlflow"]["user"],
        "password": made["crab-mlflow"]["password"],
        **made[name],
    }


@contextmanager
def running(folder: Path, *without: str, hosts: str = HOSTS) -> Iterator[Shipped]:
    """The server of the overlay `kind`; `without` arguments that are planted away."""
    values = secret("kind", "crab-mlflow-server")
    database = f"sqlite:///{folder}/mlflow.db"
    auth = values["auth.ini"].replace(values["database_uri"], f"sqlite:///{folder}/auth.db")
    (folder / "auth.ini").write_text(auth)
    (port,) = free_ports(1)
    (container,) = pod_templates("kind")["crab-mlflow"]["spec"]["containers"]
    here = {"$(ARTIFACTS)": str(folder / "artifacts"), "$(HOSTS)": hosts.format(port=port)}
    arguments = [
        re.sub(r"\$\(\w+\)", lambda found: here[found[0]], one)
        for one in container["command"][1:]
        if one not in without
    ]
    arguments = [
        {
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={port}",
            "--workers=2": "--workers=1",
        }.get(one, one)
        for one in arguments
    ]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")} | {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": values["session_key"],
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
    }
    assert {e["name"] for e in container["env"] if e["name"].startswith("MLFLOW")} == {
        name for name in env if name.startswith("MLFLOW")
    }
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            env=env,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    shipped = Shipped(f"http://127.0.0.1:{port}", values["user"], values["password"])
    try:
        while not answers(shipped):
            assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)
        yield shipped
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(shipped: Shipped) -> bool:
    try:
        return shipped.ask("/health") == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shipped]:
    with running(tmp_path_factory.mktemp("mlflow")) as found:
        yield found


API = "/api/2.0/mlflow"
SEARCH = f"{API}/experiments/search"
NOBODY: list[Credentials] = [
    None,
    ("admin", "password1234"),
    ("crab", "password1234"),
    ("crab", ""),
]


@pytest.mark.parametrize("credentials", NOBODY, ids=["none", "default", "guess", "empty"])
def test_who_is_not_known_is_refused(shipped: Shipped, credentials: Credentials) -> None:
    search = b'{"max_results": 1}'
    assert shipped.ask(SEARCH, credentials, method="POST", body=search) == 401
    assert shipped.ask("/", credentials) == 401
    assert shipped.ask("/api/2.0/mlflow-artifacts/artifacts?path=.", credentials) == 401
    for path in ("/ajax-api/3.0/jobs/", "/api/3.0/jobs/", "/ajax-api/3.0/jobs/1"):
        assert shipped.ask(path, credentials) in (401, 403, 404), path
        assert shipped.ask(path, credentials, method="POST", body=b"{}") in (401, 403, 404, 405), (
            path
        )


@pytest.mark.parametrize(
    "host", ["evil.test", "localhost", "127.0.0.1:5000", "crab-mlflow.crab.svc.evil.test"]
)
def test_a_name_that_is_not_ours_is_refused(shipped: Shipped, host: str) -> None:
    """DNS rebinding: a page of somebody else's asks from a browser that knows the password."""
    known = (shipped.user, shipped.password)
    assert shipped.ask(SEARCH, known, host, "POST", b'{"max_results": 1}') == 403
    assert shipped.ask(SEARCH, known, SERVICE, "POST", b'{"max_results": 1}') == 200


def test_the_kubelet_may_ask_how_it_is(shipped: Shipped) -> None:
    """By the pod's address, which is in no list of hosts."""
    assert shipped.ask("/health", host="10.1.2.3:5000") == 200


@pytest.mark.parametrize(
    "trace", ["..%2F..%2F..%2Fetc%2Fpasswd", "%2e%2e/%2e%2e/etc/passwd", "tr-..%2F..%2Fa"]
)
def test_a_path_out_of_the_artefacts_is_refused(shipped: Shipped, trace: str) -> None:
    known = (shipped.user, shipped.password)
    for path in (
        f"/ajax-api/2.0/mlflow/get-trace-artifact?request_id={trace}",
        f"/api/2.0/mlflow-artifacts/artifacts/{trace}",
        f"{API}/traces/{trace}/info",
    ):
        assert shipped.ask(path, known) >= 400, path


def test_a_run_is_tracked_by_who_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, hosts=f"{HOSTS},127.0.0.1:{{port}}") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", server.user)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.password)
        with tracking.start_run(
            server.url, "shipped", "a-run", spec={"a": 1}, folder=tmp_path
        ) as run:
            run.metrics({"loss": 1.0}, 1)
            (tmp_path / "note.txt").write_text("hello")
            run.file(tmp_path / "note.txt")
        # A password costs a hash a request: on a busy machine the run ends before all of it is delivered.
        deliver_folder(tmp_path / FOLDER, give_up_s=120)
        client = MlflowClient(server.url)
        (experiment,) = client.search_experiments(filter_string="name = 'shipped'")
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.data.metrics["loss"] == 1.0
        assert "note.txt" in {file.path for file in client.list_artifacts(found.info.run_id)}


def test_a_server_without_authentication_is_found(tmp_path: Path) -> None:
    """Teeth: without --app-name=basic-auth everybody gets in."""
    with running(tmp_path, "--app-name=basic-auth") as server:
        assert server.ask(SEARCH, None, method="POST", body=b'{"max_results": 1}') == 200


def test_the_hosts_of_prod_have_the_name_of_its_ingress() -> None:
    (ingress,) = of_kind("prod", "Ingress")
    (rule,) = ingress["spec"]["rules"]
    (config,) = [c for c in of_kind("prod", "ConfigMap") if c["metadata"]["name"] == "crab-mlflow"]
    hosts = config["data"]["hosts"].split(",")
    assert rule["host"] in hosts
    assert not [host for host in hosts if "*" in host]
