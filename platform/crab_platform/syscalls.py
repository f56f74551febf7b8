"""Which files a program opens, seen by the kernel: also those that native code opens by itself.

Needs `strace` (a package of that name in Debian). A program under it runs several times slower, so this is for audits
and tests.
"""

from __future__ import annotations

import codecs
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from crab_platform.audit import Access, Kind

BEGIN, END = "/crab-audit/begin", "/crab-audit/end"
"""Paths that do not exist; a program that tries to open them marks the part that is audited."""

_CALL = re.compile(r"(?P<pid>\d+) +(?:open|openat|openat2|creat)\((?P<arguments>.*)")
_REST = re.compile(r"(?P<pid>\d+) +<\.\.\. (?:open|openat|openat2|creat) resumed>(?P<arguments>.*)")
_ASKED = re.compile(r'"(?P<path>(?:[^"\\]|\\.)*)"')
_GIVEN = re.compile(r" = \d+<(?P<path>.*)>$")
_CONNECT = re.compile(r"\d+ +connect\(.*?\{sa_family=AF_INET6?, (?P<address>.*?)\}")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A program that ended, and what it and its children opened between the marks."""

    status: int
    stdout: str
    stderr: str
    accesses: tuple[Access, ...]


def available() -> bool:
    """Whether there is an strace here that may trace."""
    if not shutil.which("strace"):
        return False
    done = subprocess.run(["strace", "-qq", "-o", "/dev/null", "true"], capture_output=True)
    return done.returncode == 0


def mark(path: str) -> None:
    """Marks the begin or the end of the audited part of the program that calls this."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError:
        return
    raise FileExistsError(f"{path} exists; it should not, because opening it is a mark")


def traced(command: Sequence[str], env: Mapping[str, str] | None = None) -> Traced:
    """Runs a program to its end and tells which files it opened.

    Raises FileNotFoundError where there is no strace.
    """
    with tempfile.NamedTemporaryFile(prefix="crab-strace-") as log:
        calls = "trace=open,openat,openat2,creat,connect"
        strace = ["strace", "-f", "-y", "-qq", "-s", "4096", "-e", calls, "-e", "signal=none"]
        done = subprocess.run(
            [*strace, "-o", log.name, *command], env=env, capture_output=True, text=True
        )
        with open(log.name, errors="replace") as lines:
            accesses = tuple(_between_marks(lines))
    return Traced(status=done.returncode, stdout=done.stdout, stderr=done.stderr, accesses=accesses)


def _between_marks(lines: Iterator[str]) -> Iterator[Access]:
    active = False
    begun: dict[str, str] = {}  # pid -> the first half of a call that another thread's came between
    for raw in lines:
        line = raw.rstrip("\n")
        if connect := _CONNECT.match(line):
            if active:
                yield Access(kind="connect", what=connect["address"])
            continue
        if rest := _REST.match(line):
            arguments = begun.pop(rest["pid"], "") + rest["arguments"]
        elif call := _CALL.match(line):
            arguments = call["arguments"]
            if arguments.endswith("<unfinished ...>"):
                begun[call["pid"]] = arguments.removesuffix("<unfinished ...>")
                continue
        else:
            continue
        asked = _ASKED.search(arguments)
        if asked and asked["path"] in (BEGIN, END):
            active = asked["path"] == BEGIN
        given = _GIVEN.search(arguments)
        if active and given:
            yield _access(given["path"], arguments)


def _access(path: str, arguments: str) -> Access:
    fresh = "O_TRUNC" in arguments or "O_EXCL" in arguments or "O_WRONLY" in arguments
    kind: Kind = "list" if "O_DIRECTORY" in arguments else "make" if fresh else "read"
    plain = codecs.escape_decode(path.encode())[0].decode(errors="replace")
    return Access(kind=kind, what=plain.removesuffix(" (deleted)"))
