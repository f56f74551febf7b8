"""A Kubernetes API server on loopback, as strict as a real one about what our client does.

It has namespaced objects with resource versions, list and watch with bookmarks and a history that ends (410), dry runs,
strict validation by KubeRay's own CRDs, merge patches with optimistic locking, server-side apply with field ownership,
deletion with finalizers and owners, status as a subresource, and tokens. What it does not know it refuses with 404 or
400. `spoil` says what happens to each request.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.crd import errors

Object = dict[str, Any]
Key = tuple[str, str, str]
"""(plural, namespace, name)"""
Fault = str | int
"""pass; reset: hang up; lose: do it, then hang up; stall: silence until the client hangs up; cut: half of the answer's
body, then hang up; a number: that status."""
Spoil = Callable[[str, str], Fault]
"""(verb, path) -> fault. Verbs as RBAC has them."""
_KINDS = {
    "rayjobs": ("ray.io/v1", "RayJob"),
    "rayclusters": ("ray.io/v1", "RayCluster"),
    "pods": ("v1", "Pod"),
    "events": ("v1", "Event"),
    "secrets": ("v1", "Secret"),
    "configmaps": ("v1", "ConfigMap"),
    "workloads": ("kueue.x-k8s.io/v1beta2", "Workload"),
    "localqueues": ("kueue.x-k8s.io/v1beta2", "LocalQueue"),
}


_BUILD = dict.fromkeys(
    ("gitCommit", "gitTreeState", "buildDate", "goVersion", "compiler", "platform"), "of tests"
)


class Refused(Exception):  # noqa: N818 (what an answer is)
    """An answer that is an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "apiVersion": "v1",
            "kind": "Status",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Request:
    verb: str
    resource: str
    name: str
    fault: Fault
    at: float
    query: dict[str, str]


@dataclass(kw_only=True)
class KubeServer:
    """The state of the server. All methods may be called from any thread."""

    schemas: Path | None = None
    """Folder of KubeRay's CRDs; None: objects are not validated."""
    tokens: set[str] = field(default_factory=lambda: {"token"})
    history: int = 1000
    """So many events are kept for watches."""
    spoil: Spoil = lambda _verb, _path: "pass"
    bookmark_s: float = 0.2
    kinds: dict[str, tuple[str, str]] = field(default_factory=lambda: dict(_KINDS))
    """Of each plural the version and the kind that the server knows."""
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""
    denied: set[tuple[str, str]] = field(default_factory=set)
    """(verb, resource) of what nobody may, as SelfSubjectAccessReview tells it."""
    _objects: dict[Key, Object] = field(default_factory=dict)
    _events: list[tuple[int, str, Object]] = field(default_factory=list)
    _version: int = 1000
    _forgotten: int = 1000
    _lock: threading.Condition = field(default_factory=threading.Condition)
    _uid: int = 0

    # What tests and operators do, without a request.

    def get(self, plural: str, namespace: str, name: str) -> Object:
        with self._lock:
            found = self._objects.get((plural, namespace, name))
            if found is None:
                raise Refused(404, "NotFound", f'{plural} "{name}" not found')
            return copy.deepcopy(found)

    def all(self, plural: str) -> list[Object]:
        with self._lock:
            return [
                copy.deepcopy(o) for key, o in sorted(self._objects.items()) if key[0] == plural
            ]

    def put(self, plural: str, body: Object) -> Object:
        """Creates an object, or replaces it."""
        with self._lock:
            metadata = body["metadata"]
            key = plural, metadata["namespace"], metadata["name"]
            if key not in self._objects:
                return self.create(plural, metadata["namespace"], body)
            return self._store(key, copy.deepcopy(body), "MODIFIED")

    def set_status(self, plural: str, namespace: str, name: str, **status: Any) -> None:
        with self._lock:
            changed = self.get(plural, namespace, name)
            changed["status"] = changed.get("status", {}) | status
            self._store((plural, namespace, name), changed, "MODIFIED")

    def forget(self) -> None:
        """All events so far: watches from before get 410."""
        with self._lock:
            self._events.clear()
            self._forgotten = self._version

    # What requests do.

    def create(
        self,
        plural: str,
        namespace: str,
        body: Object,
        *,
        dry_run: bool = False,
        manager: str = "",
    ) -> Object:
        with self._lock:
            body = copy.deepcopy(body)
            metadata = body.setdefault("metadata", {})
            if metadata.get("namespace", namespace) != namespace:
                raise Refused(
                    400, "BadRequest", "the namespace of the object is not that of the request"
                )
            if not metadata.get("name"):
                raise Refused(422, "Invalid", "metadata.name: Required value")
            if "resourceVersion" in metadata:
                raise Refused(
                    400, "BadRequest", "resourceVersion should not be set on objects to be created"
                )
            self._validate(plural, body)
            key = plural, namespace, metadata["name"]
            if key in self._objects:
                raise Refused(409, "AlreadyExists", f'{plural} "{metadata["name"]}" already exists')
            body.pop("status", None)  # a subresource
            self._uid += 1
            metadata |= {
                "namespace": namespace,
                "uid": f"00000000-0000-0000-0000-{self._uid:012d}",
                "creationTimestamp": _now(),
                "generation": 1,
            }
            if manager:
                metadata["managedFields"] = [{"manager": manager, "fields": sorted(_leaves(body))}]
            if dry_run:
                return body
            return self._store(key, body, "ADDED")

    def patch(
        self, key: Key, change: Object, *, apply: bool, manager: str, force: bool, status: bool
    ) -> Object:
        plural, namespace, name = key
        with self._lock:
            if apply and key not in self._objects:
                created = copy.deepcopy(change)
                created["metadata"] |= {
                    "managedFields": [{"manager": manager, "fields": _leaves(change)}]
                }
                return self.create(plural, namespace, created)
            before = self.get(plural, namespace, name)
            wanted = change.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != before["metadata"]["resourceVersion"]:
                raise Refused(409, "Conflict", f'{plural} "{name}": the object has been modified')
            after = _merged(before, change)
            if not status:
                after["status"] = before.get("status", {})
                if not after["status"]:
                    del after["status"]
            if apply:
                owners = {
                    e["manager"]: set(e["fields"])
                    for e in before["metadata"].get("managedFields", [])
                }
                mine = set(_leaves(change))
                for other, theirs in owners.items():
                    clash = {f for f in mine & theirs if _at(before, f) != _at(change, f)}
                    if other != manager and clash and not force:
                        raise Refused(
                            409, "Conflict", f"conflict with {other}: {', '.join(sorted(clash))}"
                        )
                owners[manager] = mine
                after["metadata"]["managedFields"] = [
                    {"manager": m, "fields": sorted(f)} for m, f in sorted(owners.items())
                ]
            self._validate(plural, after)
            if after == before:
                return before  # a change that changes nothing makes no version
            if after.get("spec") != before.get("spec"):
                after["metadata"]["generation"] = before["metadata"].get("generation", 1) + 1
            return self._store(key, after, "MODIFIED")

    def delete(self, key: Key, *, orphan: bool = False) -> None:
        """With all that it owns; with `orphan` that stays."""
        with self._lock:
            found = self.get(*key)
            if found["metadata"].get("finalizers"):
                if "deletionTimestamp" not in found["metadata"]:
                    found["metadata"]["deletionTimestamp"] = _now()
                    self._store(key, found, "MODIFIED")
                return
            self._version += 1
            found["metadata"]["resourceVersion"] = str(self._version)
            del self._objects[key]
            self._tell("DELETED", found)
            if orphan:
                return
            uid = found["metadata"]["uid"]
            for other, owned in list(self._objects.items()):
                owners = owned["metadata"].get("ownerReferences", ())
                if other in self._objects and any(owner["uid"] == uid for owner in owners):
                    self.delete(other)

    def list(self, plural: str, namespace: str, query: dict[str, str]) -> Object:
        with self._lock:
            items = [
                copy.deepcopy(found)
                for (kind, where, _), found in sorted(self._objects.items())
                if kind == plural and where == namespace and _selected(found, query)
            ]
            api, kind = self.kinds[plural]
            return {
                "apiVersion": api,
                "kind": f"{kind}List",
                "metadata": {"resourceVersion": str(self._version)},
                "items": items,
            }

    def watch(self, plural: str, namespace: str, query: dict[str, str]) -> Iterator[Object]:
        """Events after a version, until the time is over; never two of the same."""
        after = int(query.get("resourceVersion") or 0)
        ends = time.monotonic() + float(query.get("timeoutSeconds", 300))
        api, kind = self.kinds[plural]
        while True:
            with self._lock:
                if after < self._forgotten:
                    raise Refused(
                        410, "Expired", f"too old resource version: {after} ({self._forgotten})"
                    )
                new = [event for event in self._events if event[0] > after]
                now = self._version  # before the wait: what comes in it has not been told
                if not new:
                    self._lock.wait(max(0.0, min(self.bookmark_s, ends - time.monotonic())))
            for version, what, found in new:
                after = version
                if (
                    found["kind"] == kind
                    and found["metadata"]["namespace"] == namespace
                    and _selected(found, query)
                ):
                    yield {"type": what, "object": found}
            if time.monotonic() >= ends:
                return
            if not new and query.get("allowWatchBookmarks") == "true":
                after = max(after, now)
                yield {
                    "type": "BOOKMARK",
                    "object": {
                        "apiVersion": api,
                        "kind": kind,
                        "metadata": {"resourceVersion": str(after)},
                    },
                }

    def cluster_wide(self, method: str, path: str, body: Object) -> Object | None:
        """The version, what an API group has, and reviews of access; None for all other paths."""
        if (method, path.rstrip("/")) == ("GET", "/version"):
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.1", **_BUILD}
        if (method, path) == ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            allowed = (asked["verb"], asked["resource"]) not in self.denied
            return body | {"status": {"allowed": allowed}}
        if method == "GET" and path.count("/") == 3 and path.startswith("/apis/"):
            version = path.removeprefix("/apis/")
            found = [name for name, (api, _) in self.kinds.items() if api == version]
            if found:
                return {
                    "kind": "APIResourceList",
                    "groupVersion": version,
                    "resources": [{"name": name} for name in found],
                }
        return None

    def _validate(self, plural: str, body: Object) -> None:
        api, kind = self.kinds[plural]
        if (body.get("apiVersion"), body.get("kind")) != (api, kind):
            raise Refused(
                400,
                "BadRequest",
                f"expected {api} {kind}, got {body.get('apiVersion')} {body.get('kind')}",
            )
        file = self.schemas / f"{plural}.yaml" if self.schemas else None
        if file is not None and file.exists():
            plain = {name: value for name, value in body.items() if name != "status"}
            if found := errors(file, plain):
                raise Refused(400, "BadRequest", f"strict decoding error: {'; '.join(found)}")

    def _store(self, key: Key, body: Object, what: str) -> Object:
        self._version += 1
        body["metadata"]["resourceVersion"] = str(self._version)
        self._objects[key] = body
        self._tell(what, body)
        return copy.deepcopy(body)

    def _tell(self, what: str, body: Object) -> None:
        self._events.append((self._version, what, copy.deepcopy(body)))
        while len(self._events) > self.history:
            self._forgotten = self._events.pop(0)[0]
        self._lock.notify_all()


@contextmanager
def kube_api_server(server: KubeServer) -> Iterator[KubeServer]:
    """Serves on loopback; `server.endpoint` is its URL."""

    class Handler(_Handler):
        state = server

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.endpoint = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _HangUp(Exception):  # noqa: N818 (what happens)
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: KubeServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name there)
        """The state has all requests."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        try:
            wide = self.state.cluster_wide(method, url.path, body)
            if wide is not None:
                self._answer(200, wide, "pass")
                return
            namespace, plural, name, part = _parse(url.path, self.state.kinds)
            verb = _verb(method, name, query)
            fault = self.state.spoil(verb, self.path)
            self.state.requests.append(
                Request(
                    verb=verb,
                    resource=plural,
                    name=name,
                    fault=fault,
                    at=time.monotonic(),
                    query=query,
                )
            )
            self._before(fault)
            if (
                self.headers.get("Authorization", "").removeprefix("Bearer ")
                not in self.state.tokens
            ):
                raise Refused(401, "Unauthorized", "Unauthorized")
            if verb == "watch":
                self._stream(self.state.watch(plural, namespace, query), fault)
                return
            self._answer(200, self._do(method, (plural, namespace, name), part, query, body), fault)
        except Refused as refused:
            self._answer(refused.code, refused.status, "pass")
        except (_HangUp, BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _before(self, fault: Fault) -> None:
        if isinstance(fault, int):
            reasons = {
                429: "TooManyRequests",
                401: "Unauthorized",
                403: "Forbidden",
                410: "Expired",
            }
            raise Refused(fault, reasons.get(fault, "InternalError"), f"planted {fault}")
        if fault == "reset":
            raise _HangUp
        if fault == "stall":
            self.connection.settimeout(60)
            try:
                self.rfile.read(1)  # nothing comes until the client has gone
            except OSError:
                pass
            raise _HangUp

    def _do(self, method: str, key: Key, part: str, query: dict[str, str], body: Object) -> Object:
        plural, namespace, name = key
        if method == "GET":
            return self.state.get(*key) if name else self.state.list(plural, namespace, query)
        if method == "POST":
            if query.get("fieldValidation") != "Strict":
                raise Refused(400, "BadRequest", "this server wants fieldValidation=Strict")
            return self.state.create(
                plural,
                namespace,
                body,
                dry_run=query.get("dryRun") == "All",
                manager=query.get("fieldManager", ""),
            )
        if method == "PATCH":
            kind = self.headers.get("Content-Type", "")
            apply = kind == "application/apply-patch+yaml"
            if not apply and kind != "application/merge-patch+json":
                raise Refused(415, "UnsupportedMediaType", f"{kind} is not known")
            if apply and not query.get("fieldManager"):
                raise Refused(400, "BadRequest", "fieldManager is required for apply patch")
            return self.state.patch(
                key,
                body,
                apply=apply,
                manager=query.get("fieldManager", "unknown"),
                force=query.get("force") == "true",
                status=part == "status",
            )
        self.state.delete(key, orphan=query.get("propagationPolicy") == "Orphan")
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _answer(self, code: int, value: Object, fault: Fault) -> None:
        if fault == "lose":
            raise _HangUp
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.wfile.flush()
        if fault == "cut":
            raise _HangUp

    def _stream(self, events: Iterator[Object], fault: Fault) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                line = json.dumps(event).encode() + b"\n"
                if fault in ("cut", "lose"):
                    self._chunk(line[: len(line) // 2])
                    raise _HangUp
                self._chunk(line)
        except Refused as refused:  # in the middle of a watch it is an event
            self._chunk(json.dumps({"type": "ERROR", "object": refused.status}).encode() + b"\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _parse(path: str, kinds: dict[str, tuple[str, str]]) -> tuple[str, str, str, str]:
    """(namespace, plural, name, subresource) of a path; Refused for one that there is not."""
    parts = path.strip("/").split("/")
    group = parts[1:3] if parts[0] == "apis" else parts[1:2]
    rest = parts[1 + len(group) :]
    if parts[0] not in ("api", "apis") or len(rest) < 3 or rest[0] != "namespaces":
        raise Refused(404, "NotFound", f"no such path: {path}")
    _, namespace, plural, *more = rest
    if plural not in kinds or kinds[plural][0] != "/".join(group):
        raise Refused(404, "NotFound", f"the server could not find the requested resource: {path}")
    return namespace, plural, more[0] if more else "", more[1] if len(more) > 1 else ""


def _verb(method: str, name: str, query: dict[str, str]) -> str:
    if method == "GET":
        return "get" if name else ("watch" if query.get("watch", "").lower() == "true" else "list")
    return {"POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]


def _selected(found: Object, query: dict[str, str]) -> bool:
    labels = found["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        if _at(found, path) != value:
            return False
    return True


def _merged(before: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict) or not isinstance(before, dict):
        return copy.deepcopy(change)
    after = copy.deepcopy(before)
    for name, value in change.items():
        if value is None:
            after.pop(name, None)
        else:
            after[name] = _merged(before.get(name), value)
    return after


def _leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict) and value:
        found: list[str] = []
        for name, inner in value.items():
            found += _leaves(inner, f"{path}.{name}" if path else name)
        return found
    return [path]


def _at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
