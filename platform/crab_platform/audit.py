"""What a computation reads from outside, held against what it was said to read.

A cached result is right for everybody only when all that decided it is in its key. `audited` runs a computation and
notes, at the edge of the process, every file that it opens, every folder that it lists, every variable of the
environment that it asks for, every connection and every program that it starts (Python's audit events, and a
dictionary of the environment that remembers questions). `judge` names what was not declared. What native code opens by
itself is not seen here: `crab_platform.syscalls` sees it from outside.
"""

from __future__ import annotations

import fnmatch
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["read", "make", "list", "variable", "connect", "start"]

SYSTEM = ("/proc", "/sys", "/dev", "/usr/share/locale", "/usr/lib/locale", "/usr/share/zoneinfo")
"""Folders of the kernel and of the C library: how many cores there are, how dates are written."""
SYSTEM_FILES = (
    "/etc/ld.so.cache",
    "/etc/locale.alias",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/ssl/openssl.cnf",
    f"{sys.prefix}/pyvenv.cfg",
)
"""Where libraries lie, how time zones and ciphers are set up, who runs this."""
SYSTEM_CODE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt")
"""Where shared libraries lie; of these folders only such files count as code."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """One thing that was asked of the world."""

    kind: Kind
    what: str
    """An absolute path, the name of a variable, an address, or a program."""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a computation may read, because its key covers it or because it cannot matter.

    Code counts as declared: its versions are in the key, or are bumped there when results change.
    """

    files: frozenset[str]
    """Absolute paths of the inputs."""
    code: tuple[str, ...] = ()
    """Folders of own packages: only Python files in them count, not the data that may lie beside."""
    variables: tuple[str, ...] = ()
    """Names of variables that may be asked for; `LC_*` is a pattern."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a computation read, and which of it was declared nowhere."""

    accesses: tuple[Access, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def audited(call: Callable[[], object], declared: Declared) -> Report:
    """Runs `call` in this process, on all of its threads, and reports what it read.

    Not for two at once: raises RuntimeError inside another audit. What `call` raises goes on to the caller.
    """
    with watched() as accesses:
        call()
    return judge(accesses, declared)


def judge(accesses: Iterable[Access], declared: Declared) -> Report:
    """Names every access that `declared` does not cover. A file that the computation made itself may be read."""
    seen = tuple(dict.fromkeys(accesses))
    places = _Places(declared)
    made: set[str] = set()
    problems = []
    for access in seen:
        if access.kind == "make":
            made.add(access.what)
        elif access.what not in made and (problem := places.problem(access)):
            problems.append(problem)
    return Report(accesses=seen, problems=tuple(problems))


class _Places:
    def __init__(self, declared: Declared) -> None:
        self._files = _both(declared.files) | set(SYSTEM_FILES)
        self._parents = {os.path.dirname(path) for path in _both(declared.files)}
        self._own_code = _both(declared.code)
        self._packages = _both(_package_folders())
        self._variables = declared.variables
        self._import_path = _both(entry or os.getcwd() for entry in sys.path)

    def problem(self, access: Access) -> str:
        if access.kind == "read":
            found = {access.what, os.path.realpath(access.what)}
            return "" if any(map(self._may_read, found)) else f"read the file {access.what}"
        if access.kind == "list":
            return "" if self._may_list(access.what) else f"listed the folder {access.what}"
        if access.kind == "variable":
            known = any(fnmatch.fnmatchcase(access.what, name) for name in self._variables)
            return "" if known else f"asked for the variable {access.what}"
        how = {"connect": "connected to", "start": "started the program"}[access.kind]
        return f"{how} {access.what}"

    def _may_read(self, path: str) -> bool:
        return (
            path in self._files
            or _below(path, (*SYSTEM, *self._packages))
            or (_below(path, self._own_code) and path.endswith((".py", ".pyc", ".so")))
            or (
                _below(path, SYSTEM_CODE) and (".so" in os.path.basename(path) or "/gconv/" in path)
            )
            or path.startswith("/memfd:")
        )

    def _may_list(self, path: str) -> bool:
        # Python lists the folders of its import path; loaders list the folder of the weights.
        return (
            path in self._import_path
            or path in self._parents
            or _below(path, (*SYSTEM, *self._packages, *self._own_code))
        )


def _package_folders() -> set[str]:
    """The standard library and the installed packages: their versions say what is in them."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    paths |= {sysconfig.get_path("stdlib", vars=base)}
    paths |= {os.path.join(sys.base_prefix, "lib"), *site.getsitepackages()}
    return {path for path in paths if path}


def _both(paths: Iterable[str]) -> set[str]:
    """Paths as they are written and as they are behind symbolic links."""
    absolute = {os.path.abspath(path) for path in paths}
    return absolute | {os.path.realpath(path) for path in absolute}


def _below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


# Watching one's own process.


@dataclass(kw_only=True)
class _Watch:
    accesses: list[Access] = field(default_factory=list)


_watch: _Watch | None = None
_lock = threading.Lock()
_hooked = False


@contextmanager
def watched() -> Iterator[list[Access]]:
    """Notes every access of this process while the block runs, in a list that grows."""
    global _watch, _hooked
    with _lock:
        if _watch is not None:
            raise RuntimeError("an audit is under way in this process; wait for its end")
        _watch = _Watch()
        if (
            not _hooked
        ):  # Python has no way to take a hook away; a resting one costs next to nothing
            sys.addaudithook(_hook)
            _hooked = True
    found = _watch.accesses
    environment: Any = os.environ
    plain = environment.__class__
    environment.__class__ = _asked(plain)
    try:
        yield found
    finally:
        environment.__class__ = plain
        _watch = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    watch = _watch
    if watch is None or event not in _EVENTS:
        return
    access = _EVENTS[event](args)
    if access is not None:
        watch.accesses.append(access)


def _opened(args: tuple[Any, ...]) -> Access | None:
    path, _, flags = args
    if isinstance(path, int):  # a file that is open already
        return None
    # Read-write counts as reading unless the file is emptied: what was in it may matter.
    fresh = flags & os.O_TRUNC or (flags & os.O_CREAT and flags & os.O_EXCL)
    only_written = flags & os.O_ACCMODE == os.O_WRONLY
    return Access(kind="make" if fresh or only_written else "read", what=_path(path))


def _listed(args: tuple[Any, ...]) -> Access | None:
    return None if isinstance(args[0], int) else Access(kind="list", what=_path(args[0] or "."))


def _connected(args: tuple[Any, ...]) -> Access:
    return Access(kind="connect", what=str(args[1]))


def _started(args: tuple[Any, ...]) -> Access:
    return Access(kind="start", what=os.fsdecode(args[0]))


def _path(path: Any) -> str:
    return os.path.abspath(os.fsdecode(path))


_EVENTS: dict[str, Callable[[tuple[Any, ...]], Access | None]] = {
    "open": _opened,
    "os.listdir": _listed,
    "os.scandir": _listed,
    "socket.connect": _connected,
    "subprocess.Popen": _started,
    "os.exec": _started,
    "os.posix_spawn": _started,
    "os.system": _started,
}


def _asked(plain: type[Any]) -> type[Any]:
    """A class of os.environ that notes which variables are asked for.

    The class is changed and not the object, because libraries hold the object.
    """

    class Asked(plain):  # type: ignore[misc]  # the base is known only now
        def __getitem__(self, name: str) -> str:
            _note(name)
            value: str = super().__getitem__(name)
            return value

        def __iter__(self) -> Iterator[str]:
            _note("(all of them)")
            return iter(list(super().__iter__()))

        # Handing all of it on to a child asks for nothing.
        def copy(self) -> dict[str, str]:
            return {self.decodekey(name): self.decodevalue(v) for name, v in self._data.items()}

        def __or__(self, other: Any) -> dict[str, str]:
            return {**self.copy(), **other}

        def __ror__(self, other: Any) -> dict[str, str]:
            return {**other, **self.copy()}

    return Asked


def _note(name: object) -> None:
    # Bytes are never a key of os.environ; the standard library asks for them all the same and catches the TypeError.
    if _watch is not None and isinstance(name, str):
        _watch.accesses.append(Access(kind="variable", what=name))


def python_packages(*modules: Any) -> tuple[str, ...]:
    """Folders of imported packages of our own, for `Declared.code`."""
    return tuple(str(Path(module.__file__).parent) for module in modules)
