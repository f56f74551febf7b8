"""Messages on a socket: eight bytes of length, then the bytes.

multiprocessing.Connection would do, but its `recv` cannot be given a deadline once a message has
begun, and a child may stop in the middle of one.
"""

import select
import socket
import time
from collections.abc import Callable

_SLICE_S = 0.2  # how late a child is missed whose socket is kept open by a process that it forked


class ConnectionLostError(Exception):
    """The other side has gone."""


def send(sock: socket.socket, message: bytes) -> None:
    """Send one message. Raises OSError if the other side has gone."""
    sock.sendall(len(message).to_bytes(8, "little"))
    sock.sendall(message)


def receive(
    sock: socket.socket, deadline: float | None = None, is_alive: Callable[[], bool] = lambda: True
) -> bytearray:
    """Receive one message.

    `deadline` is on the clock of `time.monotonic`; None waits for ever. Raises TimeoutError past it
    and ConnectionLostError if the other side closed the socket or `is_alive` says that it ended.
    """
    length = int.from_bytes(_read(sock, 8, deadline, is_alive), "little")
    return _read(sock, length, deadline, is_alive)


def _read(
    sock: socket.socket, count: int, deadline: float | None, is_alive: Callable[[], bool]
) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while view.nbytes:
        wait_s = _SLICE_S if deadline is None else min(_SLICE_S, deadline - time.monotonic())
        if wait_s <= 0:
            raise TimeoutError
        # Alive is asked before the poll, so that an answer written just before the end is still
        # read.
        alive = is_alive()
        if not poll.poll(wait_s * 1000):
            if not alive:
                raise ConnectionLostError("the process has ended")
            continue
        got = sock.recv_into(view)
        if got == 0:
            raise ConnectionLostError("the socket was closed")
        view = view[got:]
    return data
