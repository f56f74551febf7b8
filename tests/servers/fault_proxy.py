"""A proxy on loopback before a real S3 server, which spoils the answers that it is told to.

It works on whole requests: `spoil` is asked once for each and says what happens to it. The server
behind it is the real one, so a "lost answer" is one whose upload did arrive.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Spoil = Callable[[str, str], str | int]
"""(method, path) -> "pass", "lose" (forward, then hang up), "reset" (hang up) or a status code."""


@contextmanager
def fault_proxy(endpoint: str, spoil: Spoil) -> Iterator[str]:
    """Serve until the end of the block; yields the proxy's endpoint."""
    target = urlsplit(endpoint)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fault = spoil(self.command, self.path)
            if fault == "reset":
                self.close_connection = True
            elif isinstance(fault, int):
                self.answer(fault, {}, b"<Error><Code>Injected</Code></Error>")
            else:
                # The signature covers the Host header, so it is passed on as the client sent it.
                upstream = http.client.HTTPConnection(str(target.hostname), target.port, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers))
                response = upstream.getresponse()
                content = response.read()
                upstream.close()
                if fault == "lose":
                    self.close_connection = True
                else:
                    self.answer(response.status, dict(response.headers), content)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815 (http.server's names)

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
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
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (http.server's name)
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
