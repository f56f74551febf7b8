"""How requests to a cluster end that do not succeed. Apart from their users, which import the Kubernetes client."""

from __future__ import annotations


class ClusterError(Exception):
    """The cluster did not do what it was asked. Says what to do."""


class ClusterUnreachable(ClusterError):  # noqa: N818 (the condition that the command line reports)
    """No answer, or none but "later", however often it was asked."""


class ClusterRefused(ClusterError):  # noqa: N818 (likewise)
    """An answer that will not change by asking again."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
