"""From a file to arrays: `decode_clip` for one clip here and now, `DecodePool` for many in
children.

    source -> probe -> frames (decord, else PyAV) + sound (PyAV) -> Decoded

docs/media.md says what is done with odd files and lists the reasons.
"""

from crab.media.clip import DECODE_VERSION, decode_clip, decode_record, decode_request
from crab.media.pool import DecodePool, PoolResult
from crab.media.reasons import Failure, MediaError, Reason
from crab.media.request import Decoded, DecodeRequest
from crab.media.source import read_media, sha256_hex

__all__ = [
    "DECODE_VERSION",
    "DecodePool",
    "DecodeRequest",
    "Decoded",
    "Failure",
    "MediaError",
    "PoolResult",
    "Reason",
    "decode_clip",
    "decode_record",
    "decode_request",
    "read_media",
    "sha256_hex",
]
