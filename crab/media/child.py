"""What runs inside a decoding child: bind its life to the parent's, limit memory, answer requests.

Imports no more than decoding needs; torch in here would cost seconds and hundreds of megabytes a
child.
"""

import ctypes
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Callable

from crab.media.reasons import failure_of
from crab.media.request import Decoded, DecodeRequest
from crab.media.wire import ConnectionLostError, receive, send

_PR_SET_PDEATHSIG = 1


def main(parent: int, socket_fd: int, stderr_limit: int) -> None:
    """Serve until the parent closes the socket."""
    _die_with(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Bounds what a decoder that floods stderr can write; decoding writes no other files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (stderr_limit, stderr_limit))
    with socket.socket(fileno=socket_fd) as sock:
        sock.set_inheritable(False)
        decode, memory_bytes = pickle.loads(receive(sock))
        _limit_memory(memory_bytes)
        send(sock, pickle.dumps("ready"))
        try:
            while True:
                request: DecodeRequest = pickle.loads(receive(sock))
                send(sock, _answer(decode, request))
        except (ConnectionLostError, BrokenPipeError, ConnectionResetError):
            sys.exit(0)


def _answer(decode: Callable[[DecodeRequest], Decoded], request: DecodeRequest) -> bytes:
    try:
        return pickle.dumps(decode(request), protocol=5)
    except Exception as error:
        return pickle.dumps(Decoded.failed(request, failure_of(error)), protocol=5)


def _die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends: works while this process is stuck in native
    code.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died before we asked
        os._exit(0)


def _limit_memory(memory_bytes: int) -> None:
    """Allow `memory_bytes` of address space over what the interpreter and the libraries have taken
    by now.
    """
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    limit = now + memory_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
