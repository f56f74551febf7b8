"""S3 (AWS, MinIO, Ceph, SeaweedFS) as a store, through obstore.

Create-only is `If-None-Match: *`. Its trap is the lost answer: our upload arrives, the reply does
not, and the retry is told that the file exists. So a refusal after a failed attempt of our own is a
success when the stored bytes are ours. obstore retries reads by itself; it is told not to retry
uploads, because only the loop here knows about that.

Endpoint, region and credentials are read from AWS_* variables when the store is opened, in every
process anew; nothing secret is in the URL or in what is pickled.
"""

from __future__ import annotations

import os
import random
import re
import time
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from crab_platform.ranges import Piece
from crab_platform.storage import (
    AlreadyExists,
    Data,
    Paths,
    ShortRead,
    Store,
    StoreError,
    StoreUnreachable,
    check_path,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

SMALL_BYTES = 8 << 20
"""Up to here an upload that takes 30 s has stalled; a pack of 256 MiB may take minutes on a thin
line.
"""

CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


class ObjectStore(Store):
    """A prefix in a bucket. Safe among threads; a forked process must open its own."""

    def __init__(self, url: str, *, create_budget_s: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            # Not repeated in the message: it may hold a secret.
            raise ValueError(
                "an s3:// URL holds a bucket and a prefix, nothing else; give credentials and "
                "endpoint in AWS_* variables"
            )
        prefix = parts.path.strip("/")
        if not _BUCKET.fullmatch(parts.netloc):
            raise ValueError(f"{url!r} has no usable bucket name; expected s3://bucket/prefix")
        if prefix:
            check_path(prefix)
        if not any(os.environ.get(name) for name in CREDENTIAL_VARIABLES) and (
            os.environ.get("AWS_SKIP_SIGNATURE", "").lower() not in ("1", "true")
        ):
            raise StoreUnreachable(
                f"{url}: no credentials in the environment; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY (or one of "
                f"{', '.join(CREDENTIAL_VARIABLES[1:])}; AWS_SKIP_SIGNATURE=true reads a public "
                "bucket)"
            )
        self._bucket = parts.netloc
        self._budget_s = create_budget_s
        self.url = f"s3://{parts.netloc}/{prefix}".rstrip("/")
        self._prefix = prefix

    # Reads and uploads of each size need other time limits, which obstore keeps per client. Most
    # processes need one of the three.
    @cached_property
    def _reads(self) -> S3Store:
        return _client(self._bucket, self._prefix, limit_s=300, retries=5)

    @cached_property
    def _small_writes(self) -> S3Store:
        return _client(self._bucket, self._prefix, limit_s=30, retries=0)

    @cached_property
    def _large_writes(self) -> S3Store:
        return _client(self._bucket, self._prefix, limit_s=600, retries=0)

    def __reduce__(self) -> tuple[object, tuple[str, float]]:
        return (_reopen, (self.url, self._budget_s))

    def create(self, path: str, data: Data) -> None:
        """Upload with `If-None-Match: *`, in one request, so that a killed writer leaves nothing
        behind.

        Conflicts in flight (409), throttling, server errors and broken connections are tried again,
        with growing random pauses, until the budget is spent.
        """
        check_path(path)
        client = self._small_writes if len(data) <= SMALL_BYTES else self._large_writes
        started = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                obstore.put(client, path, data, mode="create", use_multipart=False)
                return
            except (BaseError, FileNotFoundError) as error:
                if _taken(error):
                    # After a failed attempt the file that is in the way may be the one that we
                    # wrote.
                    if attempt > 1 and self._holds(path, data):
                        return
                    raise AlreadyExists(
                        f"{self.url}/{path} exists already and is never overwritten"
                    ) from error
                pause_s = random.uniform(0.05, min(8.0, 0.1 * 2**attempt))
                spent_s = time.monotonic() - started
                if not _transient(error):
                    self._explain(error, path)
                if spent_s + pause_s > self._budget_s:
                    raise StoreUnreachable(
                        f"{self.url}/{path}: not written after {attempt} attempts in "
                        f"{spent_s:.0f} s "
                        f"({_summary(error)}); check that {_endpoint()} is up and not "
                        "throttling, then start again"
                    ) from error
                time.sleep(pause_s)

    def read(self, path: str) -> bytes:
        """All bytes of a file."""
        try:
            return bytes(obstore.get(self._reads, check_path(path)).bytes())
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, path)

    def size(self, path: str) -> int:
        """Length of a file in bytes."""
        try:
            return obstore.head(self._reads, check_path(path))["size"]
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, path)

    def list(self, prefix: str = "") -> Paths:
        """All paths below `prefix`, sorted."""
        try:
            stream = obstore.list(self._reads, check_path(prefix) if prefix else None)
            return sorted(meta["path"] for meta in stream.collect())
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, prefix)

    def _read_piece(self, path: str, piece: Piece) -> memoryview:
        try:
            data = obstore.get_range(
                self._reads, check_path(path), start=piece.start, end=piece.stop
            )
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, path)
        return memoryview(data)

    def _holds(self, path: str, data: Data) -> bool:
        return self.size(path) == len(data) and self.read(path) == data

    def _explain(self, error: Exception, path: str) -> NoReturn:
        """Raise our error for obstore's: what was asked, what came back, what to check."""
        place = f"{self.url}/{path}".rstrip("/")
        status, code = _status(error), _code(error)
        if code == "NoSuchBucket":
            raise StoreUnreachable(
                f"{place}: {_endpoint()} has no bucket {self._bucket!r}; create it, or check "
                "the URL and AWS_ENDPOINT_URL"
            ) from error
        if isinstance(error, FileNotFoundError) or status == 404:
            raise FileNotFoundError(f"{place} does not exist") from error
        if status == 416:
            raise ShortRead(f"{place}: the range starts after the end of the file") from error
        if isinstance(error, PermissionDeniedError) or status in (401, 403):
            raise StoreUnreachable(
                f"{place}: {_endpoint()} refused the credentials "
                f"({code or status or 'forbidden'}); check "
                "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, the "
                "bucket's policy "
                "and this machine's clock"
            ) from error
        if _transient(error):
            raise StoreUnreachable(
                f"{place}: no usable answer from {_endpoint()} ({_summary(error)}); check "
                "AWS_ENDPOINT_URL, "
                "AWS_REGION and the network"
            ) from error
        raise StoreError(f"{place}: {_summary(error)}") from error


def _reopen(url: str, create_budget_s: float) -> ObjectStore:
    return ObjectStore(url, create_budget_s=create_budget_s)


def _client(bucket: str, prefix: str, *, limit_s: int, retries: int) -> S3Store:
    # Plain http only where the endpoint itself says so: a redirect or a typo never sends a request
    # in the clear.
    options: ClientConfig = {
        "allow_http": _endpoint().startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=limit_s),
    }
    if retries:
        # No byte for ten seconds is a stall. Not for uploads: there the reply comes only after the
        # whole body.
        options["read_timeout"] = timedelta(seconds=10)
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=60)}
    return S3Store(bucket, prefix=prefix or None, client_options=options, retry_config=retry)


def _endpoint() -> str:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if os.environ.get(name):
            return os.environ[name]
    return "AWS S3"


def _status(error: Exception) -> int | None:
    """The HTTP status, which obstore gives only in its text; the conformance tests pin that it is
    there.
    """
    found = _STATUS.search(str(error))
    return int(found.group(1)) if found else None


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found.group(1) if found else ""


def _taken(error: Exception) -> bool:
    # obstore reports 409 (a write in flight, which may still fail) by the same class as 412 (the
    # file is there).
    return isinstance(error, AlreadyExistsError) and _status(error) != 409


def _transient(error: Exception) -> bool:
    status = _status(error)
    return status in _TRANSIENT if status is not None else "HTTP error" in str(error)


def _summary(error: Exception) -> str:
    """The first line of obstore's report, without the dump of its internals."""
    return _code(error) or str(error).splitlines()[0][:300]
