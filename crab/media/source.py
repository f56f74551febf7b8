"""One open, one read: the bytes of a medium from a path or any fsspec URL.

Everything after this works on bytes in memory: a clip is fetched once for its hash, its frames and
its sound, and FFmpeg gets no path or protocol that a playlist could use to open something else.
"""

import hashlib

import fsspec

from crab.media.reasons import MediaError, Reason

MAX_SOURCE_BYTES = 1 << 30
"""A clip is held in memory; an hour of 1080p is about this much."""


def read_media(source: str) -> bytes:
    """All bytes of `source`: a local path, `file://`, `s3://` (with s3fs installed) or another
    fsspec URL.

    Raises MediaError: not_found, unreachable, empty_file, too_large.
    """
    try:
        with fsspec.open(source, "rb") as file:
            data = bytes(file.read(MAX_SOURCE_BYTES + 1))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise MediaError(Reason.NOT_FOUND, f"{source}: no such file or object") from error
    except (OSError, TimeoutError, ImportError, ValueError) as error:
        # ImportError and ValueError: the protocol's library is missing, or fsspec does not know the
        # protocol.
        raise MediaError(
            Reason.UNREACHABLE, f"{source}: {type(error).__name__}: {error}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # Stores raise classes of their own (botocore's, aiohttp's) that share no base but
        # Exception.
        raise MediaError(
            Reason.UNREACHABLE, f"{source}: {type(error).__name__}: {error}"
        ) from error
    if not data:
        raise MediaError(Reason.EMPTY_FILE, f"{source}: 0 bytes")
    if len(data) > MAX_SOURCE_BYTES:
        raise MediaError(
            Reason.TOO_LARGE, f"{source}: more than {MAX_SOURCE_BYTES} bytes; cut it into clips"
        )
    return data


def sha256_hex(data: bytes) -> str:
    """SHA-256 of the media bytes: the first word of every cache key."""
    return hashlib.sha256(data).hexdigest()
