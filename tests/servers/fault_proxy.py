"""A proxy on loopback before a real S3 server, which spoils what it is told to and counts the rest.

`spoil` is asked once for each request and says what happens to it. The server behind it is the real
one, so a "lost answer" is one whose upload did arrive.
"""

from __future__ import annotations

import http.client
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, urlsplit

Operation = Literal["PUT", "GET", "HEAD", "LIST", "DELETE", "MULTIPART", "OTHER"]

CODES = {
    400: "RequestTimeout",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}
"""What S3 writes beside these statuses."""

_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class PartOf:
    """Pass on this share of the body, call `then`, and after that whatever of it still comes."""

    share: float
    then: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    """Set when nothing more of the request will go on."""


Fault = str | int | PartOf
"""What happens to a request:

pass      nothing
lose      forward, then hang up: done, and nobody knows
deny      forward, then refuse with 412 what was just done
reset     hang up
stall     keep silent until the client hangs up
cut       forward half of the body, then hang up on both sides
truncate  forward, answer with half of the answer's body, hang up
number    answer with that status
PartOf    see there
"""

Spoil = Callable[[str, str], Fault]
"""(method, path with query) -> fault."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request that came to the proxy."""

    operation: Operation
    path: str
    fault: str
    range: tuple[int, int] | None
    """First and last byte asked for, None for the whole."""


@dataclass(kw_only=True)
class Traffic:
    """All requests so far, in the order they came."""

    requests: list[Request] = field(default_factory=list)
    stalled_s: list[float] = field(default_factory=list)
    """For each stall that the client ended: how long it had waited."""

    def count(self) -> Counter[str]:
        """Operation -> requests."""
        return Counter(request.operation for request in list(self.requests))

    def faults(self) -> Counter[str]:
        """Fault -> requests that it hit."""
        return Counter(request.fault for request in list(self.requests))

    def of(self, operation: Operation) -> list[Request]:
        """The requests of one kind."""
        return [request for request in list(self.requests) if request.operation == operation]


def untouched(method: str, path: str) -> Fault:
    """A `spoil` for those who only count."""
    return "pass"


def operation_of(method: str, path: str) -> Operation:
    """What a request is to S3: a listing is a GET, and parts of an upload are PUTs."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if "uploads" in query or "uploadId" in query:
        return "MULTIPART"
    if method == "GET" and ("list-type" in query or "prefix" in query):
        return "LIST"
    known: dict[str, Operation] = {"PUT": "PUT", "GET": "GET", "HEAD": "HEAD", "DELETE": "DELETE"}
    return known.get(method, "OTHER")


@contextmanager
def fault_proxy(endpoint: str, spoil: Spoil, traffic: Traffic | None = None) -> Iterator[str]:
    """Serve until the end of the block; yields the proxy's endpoint. Requests go into `traffic`."""
    target = urlsplit(endpoint)
    lock = threading.Lock()
    seen = Traffic() if traffic is None else traffic

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            with lock:
                fault = spoil(self.command, self.path)
                seen.requests.append(self.request_seen(fault))
            length = int(self.headers.get("Content-Length") or 0)
            if isinstance(fault, PartOf):
                try:
                    self.forward_in_parts(length, fault)
                finally:
                    fault.done.set()
                return
            body = self.rfile.read(length)
            if len(body) < length:  # the client is gone, and so is its request
                self.close_connection = True
            elif fault == "reset":
                self.close_connection = True
            elif fault == "stall":
                self.stall()
            elif fault == "cut":
                upstream = self.forward_head(length)
                upstream.send(body[: length // 2])
                upstream.close()
                self.close_connection = True
            elif isinstance(fault, int):
                self.refuse(fault)
            else:
                upstream = self.forward_head(length)
                upstream.send(body)
                self.pass_back(upstream, fault)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815 (http.server's names)

        def request_seen(self, fault: Fault) -> Request:
            asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            return Request(
                operation=operation_of(self.command, self.path),
                path=urlsplit(self.path).path,
                fault="part" if isinstance(fault, PartOf) else str(fault),
                range=(int(asked[0]), int(asked[1])) if len(asked) == 2 else None,
            )

        def forward_head(self, length: int) -> http.client.HTTPConnection:
            """Send the head on. The signature covers the Host header, so that goes as it came."""
            upstream = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            return upstream

        def pass_back(self, upstream: http.client.HTTPConnection, fault: Fault) -> None:
            response = upstream.getresponse()
            content = response.read()
            upstream.close()
            if fault == "lose":
                self.close_connection = True
            elif fault == "deny" and response.status == 200:
                self.refuse(412)
            else:
                self.answer(
                    response.status, dict(response.headers), content, whole=fault != "truncate"
                )

        def forward_in_parts(self, length: int, fault: PartOf) -> None:
            upstream = self.forward_head(length)
            left, until = length, length - int(length * fault.share)
            told = False
            while True:
                if not told and left <= until:
                    told = True
                    fault.then()
                if not left:
                    self.pass_back(upstream, "pass")
                    return
                wanted = min(_CHUNK, left - until if not told else left)
                chunk = self.read_some(wanted)
                if not chunk:
                    upstream.close()
                    self.close_connection = True
                    return
                upstream.send(chunk)
                left -= len(chunk)

        def read_some(self, limit: int) -> bytes:
            try:
                return self.rfile.read1(limit)  # type: ignore[attr-defined]  # a BufferedReader
            except ConnectionError:
                return b""

        def stall(self) -> None:
            began = time.monotonic()
            self.read_some(1)
            with lock:
                seen.stalled_s.append(time.monotonic() - began)
            self.close_connection = True

        def refuse(self, status: int) -> None:
            code = CODES.get(status, "Injected")
            self.answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())

        def answer(
            self, status: int, headers: dict[str, str], content: bytes, *, whole: bool = True
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in (
                    "connection",
                    "transfer-encoding",
                    "content-length",
                    "date",
                ):
                    self.send_header(name, value)
            length = headers.get("Content-Length", str(len(content)))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if whole else content[: len(content) // 2])
            if not whole:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
            """Quiet."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # clients that were killed
                super().handle_error(request, client_address)  # type: ignore[arg-type]

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
