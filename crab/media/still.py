"""Still images through Pillow: a clip of one frame.

The image is turned as its EXIF orientation says, as viewers do, then resized to the square
(bicubic, as CLIP's own preprocessing). Of an animated GIF or WebP the first frame is taken.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crab.media.reasons import MediaError, Reason

MAX_IMAGE_PIXELS = 1 << 26
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def is_image(data: bytes) -> bool:
    """True if the first bytes are those of an image format that we read (a file's name says
    nothing).
    """
    return (
        data.startswith(
            (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*")
        )
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or (data[:2] == b"BM" and data[6:10] == b"\0\0\0\0")
    )


def read_still(data: bytes, size: int) -> np.ndarray:
    """Image bytes -> uint8 [1, size, size, 3] RGB.

    Raises MediaError: too_large (before any pixel is decoded), truncated, corrupt.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise MediaError(
                    Reason.TOO_LARGE,
                    f"{width}x{height} pixels; the limit is {MAX_IMAGE_PIXELS} pixels",
                )
            upright = ImageOps.exif_transpose(image)
            square = upright.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(Reason.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise MediaError(
            Reason.CORRUPT, f"starts like an image, but Pillow cannot open it: {error}"
        ) from error
    except (OSError, SyntaxError) as error:
        cut = "truncated" in str(error).lower()
        raise MediaError(Reason.TRUNCATED if cut else Reason.CORRUPT, f"Pillow: {error}") from error
    return np.asarray(square, dtype=np.uint8)[None]
