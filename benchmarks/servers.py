"""Servers for the cache benchmarks, all on loopback, read-only and S3 path-style.

nginx (Debian's nginx-light) serves GET, HEAD and Range from a folder: /bucket/key is a file. It has no LIST, so it
hands requests with `list-type=` to a small Python server, which answers them from the same folder. `latency_server` is
one asyncio process that answers every request after a pause.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

_NGINX = """
daemon off; worker_processes 2; pid {work}/pid; error_log {work}/error.log;
{user}
events {{ worker_connections 4096; }}
http {{
  log_format requests '$request_method $request_uri';
  access_log {log};
  sendfile on; tcp_nodelay on; keepalive_requests 100000000; root {root};
  tcp_nopush off;  # on, a range of some 100 KB waits 40 ms for an acknowledgement
  client_body_temp_path {work}/t1; proxy_temp_path {work}/t2; fastcgi_temp_path {work}/t3;
  uwsgi_temp_path {work}/t4; scgi_temp_path {work}/t5;
  map $args $is_list {{ default 0; "~list-type=" 1; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ if ($is_list) {{ proxy_pass http://127.0.0.1:{lister}; }} }}
  }}
}}
"""


@contextmanager
def nginx(root: Path, work: Path, *, log: Path | None = None) -> Iterator[str]:
    """The URL of an nginx that serves `root`. `log` receives a line a request: method and URI."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if binary is None:
        raise SystemExit("nginx is missing: apt-get install nginx-light")
    work.mkdir(parents=True, exist_ok=True)
    port, lister = free_port(), free_port()
    lists = multiprocessing.get_context("spawn").Process(
        target=_serve_lists, args=(root, lister), daemon=True
    )
    lists.start()
    conf = work / "nginx.conf"
    conf.write_text(
        _NGINX.format(
            work=work,
            root=root,
            port=port,
            lister=lister,
            log=f"{log} requests" if log else "off",
            user="user root;" if os.geteuid() == 0 else "",
        )
    )
    server = subprocess.Popen(
        [binary, "-p", str(work), "-c", str(conf)], stderr=(work / "stderr").open("wb")
    )
    try:
        wait_for(port)
        wait_for(lister)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(10)
        lists.terminate()
        lists.join()


@contextmanager
def latency_server(root: Path, latency_s: float) -> Iterator[str]:
    """The URL of a server that answers every request `latency_s` after it came."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve_slowly, args=(root, port, latency_s), daemon=True
    )
    process.start()
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


def requests_in(log: Path) -> Counter[str]:
    """GET, HEAD and LIST requests in an access log."""
    return Counter(
        "LIST" if "list-type=" in line else line.split(" ", 1)[0]
        for line in log.read_text().splitlines()
    )


def use_endpoint(url: str) -> None:
    """Point S3 clients of this process and its children at a server."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_PROFILE"):
        os.environ.pop(name, None)
    os.environ.update(
        AWS_ENDPOINT_URL=url,
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(port: int) -> None:
    """Return when somebody listens on the port."""
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"no server on port {port}")


def list_answer(root: Path, target: str) -> bytes:
    """The XML of one ListObjectsV2 request, all keys on one page."""
    url = urlsplit(target)
    query = dict(parse_qsl(url.query))
    bucket = unquote(url.path).strip("/")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    top = root / bucket
    keys: dict[str, int] = {}
    folders: set[str] = set()
    for folder, _, files in os.walk(top / os.path.dirname(prefix)):
        for name in files:
            path = Path(folder, name)
            key = path.relative_to(top).as_posix()
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter, 1)[0] + delimiter)
            else:
                keys[key] = path.stat().st_size
    rows = "".join(
        f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"0"</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>'
        for key, size in sorted(keys.items())
    ) + "".join(
        f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        for name in sorted(folders)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys)}</KeyCount>"
        f"<MaxKeys>{max(len(keys), 1000)}</MaxKeys><IsTruncated>false</IsTruncated>{rows}"
        "</ListBucketResult>"
    ).encode()


def _serve_lists(root: Path, port: int) -> None:
    class Lists(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = list_answer(root, self.path)
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Lists).serve_forever()


def _serve_slowly(root: Path, port: int, latency_s: float) -> None:
    files: dict[str, bytes] = {}

    def load(target: str) -> bytes | None:
        path = unquote(urlsplit(target).path)
        if path not in files:
            file = root / path.lstrip("/")
            if not file.is_file():
                return None
            files[path] = file.read_bytes()
        return files[path]

    def answer(request: str) -> tuple[bytes, memoryview]:
        method, target, _ = request.split("\r\n", 1)[0].split(" ", 2)
        if "list-type=" in target:
            body = list_answer(root, target)
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
            return head.encode(), memoryview(body)
        found = load(target)
        if found is None:
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", memoryview(b"")
        data, status = memoryview(found), "200 OK"
        common = (
            'ETag: "0"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n'
        )
        if wanted := re.search(r"(?i)\r\nrange: *bytes=(\d*)-(\d*)", request):
            size = len(data)
            start = int(wanted[1]) if wanted[1] else size - int(wanted[2])
            stop = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
            data, status = data[start:stop], "206 Partial Content"
            common += f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        head = f"HTTP/1.1 {status}\r\n{common}Content-Length: {len(data)}\r\n\r\n"
        return head.encode(), data if method != "HEAD" else memoryview(b"")

    class Slow(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self.transport = transport
            self.read = b""

        def data_received(self, data: bytes) -> None:
            self.read += data
            while (end := self.read.find(b"\r\n\r\n")) >= 0:
                request, self.read = self.read[:end], self.read[end + 4 :]
                asyncio.get_running_loop().call_later(latency_s, self.reply, request)

        def reply(self, request: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.writelines(answer(request.decode("latin-1")))

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(
            Slow, "127.0.0.1", port, backlog=1024
        )
        await server.serve_forever()

    asyncio.run(serve())
