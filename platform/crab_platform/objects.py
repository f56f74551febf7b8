"""S3 (AWS, MinIO, Ceph, SeaweedFS) as a store, through obstore.

Create-only is `If-None-Match: *`. Its trap is the lost answer: our upload arrives, the reply does
not, and the retry is told that the file exists. So every upload carries a name of its own in the
file's metadata, and a refusal is a success when the file that is there carries it. (Equal bytes
would not do: of two that write the same lock, one must lose.) obstore retries reads by itself; it
is told not to retry uploads, because only the loop in `retry.py` knows about that.

Endpoint, region and credentials are read from AWS_* variables when the store is opened, in every
process anew; nothing secret is in the URL or in what is pickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from crab_platform.clock import SYSTEM
from crab_platform.ranges import Piece
from crab_platform.retry import Taken, Transient, create_with_retries
from crab_platform.storage import (
    Data,
    Paths,
    ShortRead,
    Store,
    StoreError,
    StoreRefused,
    StoreUnreachable,
    check_path,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

STALL_S = 10
"""No byte of an answer for so long is a stall."""

WRITE_MARK = "crab-write"
"""Metadata of a stored file: which call of `create` wrote it."""

_CLASS_BYTES = (1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)

CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {"RequestTimeout"}  # S3 says this, with 400, of a body that came too slowly
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
        self._writers: dict[int, S3Store] = {}

    # Reads and uploads of each size need other time limits, which obstore keeps per client. Most
    # processes need two of them.
    @cached_property
    def _reads(self) -> S3Store:
        return _client(self._bucket, self._prefix, limit_s=300, retries=5)

    def _writes(self, num_bytes: int) -> S3Store:
        limit_s = upload_limit_s(num_bytes)
        if limit_s not in self._writers:
            client = _client(self._bucket, self._prefix, limit_s=limit_s, retries=0)
            self._writers.setdefault(limit_s, client)  # another thread may have been faster
        return self._writers[limit_s]

    def __reduce__(self) -> tuple[object, tuple[str, float]]:
        return (_reopen, (self.url, self._budget_s))

    def create(self, path: str, data: Data) -> None:
        """Upload with `If-None-Match: *`, in one request, so that a killed writer leaves nothing
        behind.

        Conflicts in flight (409), throttling, server errors and broken connections are tried again,
        with growing random pauses, until the budget is spent.
        """
        check_path(path)
        client = self._writes(len(data))
        mark = SYSTEM.new_id()

        def put() -> None:
            try:
                obstore.put(
                    client,
                    path,
                    data,
                    mode="create",
                    use_multipart=False,
                    attributes={WRITE_MARK: mark},
                )
            except (BaseError, FileNotFoundError) as error:
                if _taken(error):
                    raise Taken(_summary(error)) from error
                if _transient(error):
                    raise Transient(_summary(error)) from error
                self._explain(error, path)

        create_with_retries(
            put,
            lambda: self._written_by(path, mark),
            clock=SYSTEM,
            budget_s=self._budget_s,
            what=f"{self.url}/{path}",
            advice=f"check that {_endpoint()} is up and not throttling, then start again",
        )

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

    def delete(self, path: str) -> None:
        """Remove an object; S3 says yes to one that does not exist, too."""
        try:
            obstore.delete(self._reads, check_path(path))
        except FileNotFoundError:
            return
        except BaseError as error:
            self._explain(error, path)

    def _read_piece(self, path: str, piece: Piece) -> memoryview:
        try:
            data = obstore.get_range(
                self._reads, check_path(path), start=piece.start, end=piece.stop
            )
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, path)
        return memoryview(data)

    def _read_pieces(self, path: str, pieces: Sequence[Piece]) -> Sequence[memoryview]:
        if len(pieces) == 1:
            return [self._read_piece(path, pieces[0])]
        try:
            # Up to ten requests at a time, without Python between them.
            found = obstore.get_ranges(
                self._reads,
                check_path(path),
                starts=[piece.start for piece in pieces],
                ends=[piece.stop for piece in pieces],
                coalesce=0,
            )
        except (BaseError, FileNotFoundError) as error:
            self._explain(error, path)
        return [memoryview(data) for data in found]

    def _written_by(self, path: str, mark: str) -> bool:
        """Whether the file carries this mark. Raises Transient when that cannot be known now."""
        try:
            found = obstore.get(self._reads, path, options={"head": True})
        except FileNotFoundError as error:
            raise Transient("it was there and is gone") from error
        except BaseError as error:
            if _transient(error):
                raise Transient(_summary(error)) from error
            self._explain(error, path)
        return found.attributes.get(WRITE_MARK) == mark

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
        if (
            isinstance(error, PermissionDeniedError)
            or status in (401, 403)
            or code == "AccessDenied"
        ):
            raise StoreRefused(
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


def upload_limit_s(num_bytes: int) -> int:
    """Seconds after which an upload of this size has stalled.

    Ten, and two more for each MiB after the first: a pack of 256 MiB may take minutes on a thin
    line. Sizes are rounded up to a few classes, since each limit needs a client of its own.
    """
    limit = next((limit for limit in _CLASS_BYTES if num_bytes <= limit), num_bytes)
    return STALL_S + 2 * (-(-limit >> 20) - 1)


def _client(bucket: str, prefix: str, *, limit_s: int, retries: int) -> S3Store:
    # Plain http only where the endpoint itself says so: a redirect or a typo never sends a request
    # in the clear.
    options: ClientConfig = {
        "allow_http": _endpoint().startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "timeout": timedelta(seconds=limit_s),
    }
    if retries:
        # Not for uploads: there the reply comes only after the whole body.
        options["read_timeout"] = timedelta(seconds=STALL_S)
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
    if _code(error) in _TRANSIENT_CODES:
        return True
    status = _status(error)
    return status in _TRANSIENT if status is not None else "HTTP error" in str(error)


def _summary(error: Exception) -> str:
    """The first line of obstore's report, without the dump of its internals."""
    return _code(error) or str(error).splitlines()[0][:300]
