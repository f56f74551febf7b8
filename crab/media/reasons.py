"""The fixed vocabulary of why a stream was set aside, and how an exception becomes one of its
words.

Fixed, because people count by it and quarantine lists are compared between runs; a free text would
be neither. FFmpeg raises more than its own error class (UnicodeDecodeError from metadata,
IndexError from broken stream tables were both seen when fuzzing), so the mapping covers every
exception and `UNKNOWN` comes last.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why there is no array. The value is what reports and quarantine records hold."""

    NOT_FOUND = "not_found"  # no such file or object
    UNREACHABLE = "unreachable"  # could not be read now: network, permission, credentials
    EMPTY_FILE = "empty_file"  # zero bytes
    NOT_MEDIA = "not_media"  # no container or image format that we accept
    CORRUPT = "corrupt"  # a known format with damaged content
    TRUNCATED = "truncated"  # more than 2 % of what the header promises is missing
    NO_VIDEO_STREAM = "no_video_stream"  # video was asked of an audio file
    NO_AUDIO_STREAM = "no_audio_stream"  # audio was asked of a silent video or of an image
    NO_FRAMES = "no_frames"  # the stream is there and holds nothing that can be decoded
    TOO_LARGE = "too_large"  # past the limits on pixels, bytes or streams
    UNSUPPORTED_CODEC = "unsupported_codec"  # no decoder for it here, or encrypted
    DECODE_TIMEOUT = "decode_timeout"  # the child was killed at the limit on wall time
    DECODE_CRASH = "decode_crash"  # the child died
    DECODE_MEMORY = "decode_memory"  # the child reached the limit on memory
    UNKNOWN = "unknown"  # an exception that no rule above names; its text is in the detail


RETRIED = frozenset(
    {Reason.UNREACHABLE, Reason.DECODE_TIMEOUT, Reason.DECODE_CRASH, Reason.DECODE_MEMORY}
)
"""Reasons that a second attempt may cure; all others are facts about the bytes."""

MAX_DETAIL = 400


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A stream that could not be decoded: a word of the vocabulary and one line for a person."""

    reason: Reason
    detail: str


class MediaError(Exception):
    """Raised inside the decoder with the reason already known."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def one_line(text: str) -> str:
    """`text` on one line and short enough for a table."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MAX_DETAIL else flat[: MAX_DETAIL - 3] + "..."


def failure_of(error: BaseException) -> Failure:
    """Any exception out of a decoder -> its reason."""
    if isinstance(error, MediaError):
        return Failure(reason=error.reason, detail=one_line(error.detail))
    return Failure(reason=_reason_of(error), detail=one_line(f"{type(error).__name__}: {error}"))


def _reason_of(error: BaseException) -> Reason:
    # By class name for FFmpeg's own errors: this module is read by code that never loads FFmpeg.
    names = {cls.__name__ for cls in type(error).__mro__}
    if (
        isinstance(error, MemoryError) or getattr(error, "errno", None) == 12
    ):  # ENOMEM, as av.error spells it
        return Reason.DECODE_MEMORY
    if names & {"DecoderNotFoundError", "PatchWelcomeError", "NotImplementedError"}:
        return Reason.UNSUPPORTED_CODEC
    # What FFmpeg's wrappers raise over broken bytes: their own class, and metadata or stream tables
    # gone wrong.
    if names & {
        "FFmpegError",
        "UnicodeError",
        "LookupError",
        "ValueError",
        "OverflowError",
        "EOFError",
    }:
        return Reason.CORRUPT
    return Reason.UNKNOWN
