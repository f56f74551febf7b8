"""The ceiling: ranges of one file over plain sockets into memory that is there already, nothing checked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

Span = tuple[int, int]
"""(offset, length) of a file; it is put at the same offset of the memory."""


class RawClient:
    """Connections that stay open; each takes every n-th span."""

    def __init__(self, endpoint: str, path: str, connections: int) -> None:
        parts = urlsplit(endpoint)
        self._path = path
        self._host = f"{parts.hostname}:{parts.port}"
        self._sockets = [
            socket.create_connection((parts.hostname, parts.port or 80)) for _ in range(connections)
        ]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, spans: Sequence[Span], memory: memoryview) -> None:
        """Fetch all spans."""
        step = len(self._sockets)
        threads = [
            threading.Thread(target=self._fetch, args=(sock, spans[number::step], memory))
            for number, sock in enumerate(self._sockets)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _fetch(self, sock: socket.socket, spans: Sequence[Span], memory: memoryview) -> None:
        head = bytearray(4096)
        room = memoryview(head)
        for offset, length in spans:
            request = (
                f"GET {self._path} HTTP/1.1\r\nHost: {self._host}\r\n"
                f"Range: bytes={offset}-{offset + length - 1}\r\n\r\n"
            )
            sock.sendall(request.encode())
            got = 0
            while (end := head.find(b"\r\n\r\n", 0, got)) < 0:
                received = sock.recv_into(room[got:])
                if not received:
                    raise ConnectionError("the server closed the connection")
                got += received
            if not head.startswith(b"HTTP/1.1 206"):
                raise ConnectionError(bytes(head[:80]))
            body = got - end - 4
            target = memory[offset : offset + length]
            target[:body] = room[end + 4 : got]
            while body < length:
                received = sock.recv_into(target[body:])
                if not received:
                    raise ConnectionError("the server closed the connection")
                body += received
