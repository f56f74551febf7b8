"""Requests to the Kubernetes API that end: each is tried again where that can help, and never waits for ever.

The official client (37) tries again only GETs whose connection breaks, and has no time limit of its own
(reference/reliability.md 6.2). Here all requests may be sent again, so they must mean the same twice: objects have
names, and changes are patches.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import urllib3
import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from crab_platform.cluster_errors import ClusterRefused, ClusterUnreachable

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
TRY_AGAIN = {429, 500, 502, 503, 504}
GONE = 410


class WatchExpired(Exception):  # noqa: N818 (what happened)
    """The server no longer has the events since then: list again."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request is tried. With the defaults no call lasts for more than 30 s, and a
    server that is silent is given up after two minutes."""

    tries: int = 6
    connect_s: float = 5.0
    read_s: float = 10.0
    pause_s: float = 0.5
    """Before the second try; twice as long before each one after it."""
    longest_pause_s: float = 10.0
    watch_s: float = 20.0
    """A watch is begun again after so long; one that is silent for `read_s` beyond that is given up."""


@dataclass(kw_only=True)
class KubeApi:
    """A connection and a namespace."""

    connect: Callable[[], client.ApiClient]
    """Makes a client with a token as it is now."""
    namespace: str
    patience: Patience = field(default_factory=Patience)
    _client: client.ApiClient | None = None

    def ask(self, what: str, send: Callable[..., T]) -> T:
        """Sends a request until it is answered.

        Args:
            what: for errors, for example "create RayJob a".
            send: (client, _request_timeout=...) -> the answer; may be called several times.

        Raises:
            ClusterRefused: 4xx, but for 429.
            ClusterUnreachable: the last of several tries has failed too.
        """
        patience, renewed, said, wanted_s = self.patience, False, "", 0.0
        for number in range(patience.tries):
            if number:
                time.sleep(self._pause(number, wanted_s))
            wanted_s = 0.0
            try:
                return send(self.client, _request_timeout=(patience.connect_s, patience.read_s))
            except ApiException as error:
                if error.status == 401 and not renewed:
                    # A token that expired: the next one is read from where this one came from.
                    renewed, self._client, said = True, None, "401: the token is not accepted"
                    continue
                if error.status not in TRY_AGAIN:
                    raise ClusterRefused(_refusal(what, error), int(error.status or 0)) from error
                said, wanted_s = f"{error.status}: {_message(error)}", _retry_after(error)
            except (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError) as error:
                said = f"{type(error).__name__}: {error}"
            _LOG.info("cannot %s yet (%s)", what, said)
        raise ClusterUnreachable(
            f"cannot {what}: {patience.tries} tries, the last one: {said}. Check the connection with kubectl get "
            f"rayjobs -n {self.namespace}, and start the same command again"
        )

    def watch(
        self, what: str, send: Callable[..., Any], version: str
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Events after `version`, (type, object) each, for some seconds; bookmarks among them.

        The caller goes on from the version of the last one. An answer that ends early, or is cut, ends the iterator.

        Raises WatchExpired where the server no longer has that version.
        """

        def begin(api: client.ApiClient, _request_timeout: Any) -> Any:
            return send(
                api,
                watch=True,
                resource_version=version,
                timeout_seconds=max(1, round(self.patience.watch_s)),
                allow_watch_bookmarks=True,
                _preload_content=False,
                _request_timeout=(_request_timeout[0], self.patience.watch_s + _request_timeout[1]),
            )

        try:
            answer = self.ask(what, begin)
        except ClusterRefused as refused:
            if refused.status == GONE:
                raise WatchExpired from refused
            raise
        try:
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    if event["object"].get("code") == GONE:
                        raise WatchExpired
                    return
                yield event["type"], event["object"]
        except (urllib3.exceptions.HTTPError, OSError, json.JSONDecodeError) as error:
            _LOG.info("%s was cut off: %s", what, error)
        finally:
            answer.close()

    @property
    def client(self) -> client.ApiClient:
        """As it is now; made anew when its token has expired."""
        if self._client is None:
            self._client = self.connect()
            # Ours are the only tries; the client would make four of each GET.
            self._client.configuration.retries = 0
            self._client.rest_client.pool_manager.connection_pool_kw["retries"] = 0
        return self._client

    def _pause(self, number: int, wanted_s: float) -> float:
        patience = self.patience
        longest: float = min(patience.longest_pause_s, patience.pause_s * 2 ** (number - 1))
        jittered = longest * random.uniform(0.5, 1.0)
        return min(max(jittered, wanted_s), patience.read_s)


def connect_to(context: str | None) -> Callable[[], client.ApiClient]:
    """By KUBECONFIG (a context of it), or as the service account of the pod that we are in.

    The function raises ClusterUnreachable where there is neither.
    """

    def connect() -> client.ApiClient:
        settings = client.Configuration()
        loaders: Any = config  # without types
        file = os.environ.get(
            "KUBECONFIG"
        )  # as it is now: the library asks once, when it is imported
        try:
            if context is None:
                try:
                    loaders.load_incluster_config(client_configuration=settings)
                except config.ConfigException:
                    loaders.load_kube_config(file, client_configuration=settings)
            else:
                loaders.load_kube_config(file, context, client_configuration=settings)
        except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError) as error:
            # Without its words: they quote the file, which has the token.
            raise ClusterUnreachable(
                f"KUBECONFIG is broken ({type(error).__name__}); kubectl config view says where"
            ) from None
        except (config.ConfigException, OSError) as error:
            raise ClusterUnreachable(
                f"there is no cluster to talk to: {error}. Set KUBECONFIG, and see kubectl config get-contexts"
            ) from error
        return client.ApiClient(settings)

    return connect


def _lines(answer: Any) -> Iterator[bytes]:
    rest = b""
    for part in answer.stream(amt=None, decode_content=False):
        *whole, rest = (rest + part).split(b"\n")
        yield from (line for line in whole if line.strip())


def _message(error: ApiException) -> str:
    """What the server says, in one line."""
    try:
        found = json.loads(error.body or "")
    except ValueError:
        return str(error.reason)
    return str(found.get("message", error.reason)) if isinstance(found, dict) else str(error.reason)


def _refusal(what: str, error: ApiException) -> str:
    way_out = {
        401: "log in again, then check with kubectl auth whoami",
        403: "ask for the role in k8s/, or check with kubectl auth can-i",
        404: "check its name with crab jobs, and the namespace in the profile",
        422: "the spec or the profile asks for what this cluster does not know",
    }.get(int(error.status or 0))
    return f"cannot {what}: {error.status} {_message(error)}" + (f"; {way_out}" if way_out else "")


def _retry_after(error: ApiException) -> float:
    try:
        return float((error.headers or {}).get("Retry-After", 0))
    except ValueError:  # a date
        return 0.0
