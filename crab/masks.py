"""Mask files: the true masks that `MaskRef` names, as arrays at the size at which masks are judged.

AVSBench and Ref-AVS keep one PNG a frame: masks of one channel or RGB in which every pixel that is not 0 belongs to the
object, index maps in which a pixel is a class number (`labels_semantic`), and the same as colours (`labels_rgb`).
Pixels are picked, never blended, when the size changes: a blend of two class numbers is a third class.
"""

import io
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crab.samples import MaskRef

MASK_SIZE = 224
"Rows and columns of the masks that are judged, as by AVSBench and Crab. (Ref-AVS' own script: 256, blended.)"

VOC_COLOURS = tuple(
    tuple(
        sum((number >> 3 * step + channel & 1) << 7 - step for step in range(3))
        for channel in range(3)
    )
    for number in range(256)
)
"""Class number -> (R, G, B) of the PASCAL VOC colour map, of which AVSBench's labels_rgb use the first 71: every third
bit of the number, from the lowest on, is a bit of one channel, from the highest on."""


def read_mask(ref: MaskRef, size: int | None = None) -> NDArray[np.bool_]:
    """[H, W], True where a pixel belongs to the mask: in the file's own size, or `size` x `size`.

    ValueError naming the file where it is no image, or where `ref.values` asks for class numbers of a colour image.
    """
    pixels = _read(ref)
    if ref.values is None:
        mask = pixels != 0 if pixels.ndim == 2 else (pixels != 0).any(-1)
    elif ref.values == ():
        mask = np.zeros(pixels.shape[:2], bool)
    else:
        mask = np.isin(_one_channel(pixels, ref), ref.values)
    return mask if size is None else resize(mask, size)


def read_class_map(
    ref: MaskRef, size: int | None = None, palette: Sequence[Sequence[int]] | None = None
) -> NDArray[np.uint8]:
    """[H, W], the class number of each pixel: in the file's own size, or `size` x `size`.

    Classes that are not in `ref.values` become background (0); None keeps all. `palette` gives the colour (R, G, B) of
    class 0, 1, ... for a file of colours; None means VOC_COLOURS. ValueError naming the file where it is no image, or
    has a colour or a class number that cannot be.
    """
    pixels = _read(ref)
    if pixels.ndim == 3:
        colours = VOC_COLOURS if palette is None else palette
        classes = _from_palette(pixels, np.asarray(colours), ref)
    else:
        classes = _one_channel(pixels, ref)
    if classes.max(initial=0) > np.iinfo(np.uint8).max:
        raise ValueError(f"class map {ref.file}: class number {classes.max()}, expected 0..255")
    numbers = classes.astype(np.uint8)
    if ref.values is not None:
        numbers = np.where(np.isin(numbers, ref.values), numbers, 0).astype(np.uint8)
    return numbers if size is None else resize(numbers, size)


def resize(pixels: NDArray[Any], size: int) -> NDArray[Any]:
    """[H, W] of bool or uint8 -> [size, size] by Pillow's NEAREST, which AVSBench's loaders use too."""
    image = Image.fromarray(pixels.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image).astype(pixels.dtype)


def _read(ref: MaskRef) -> NDArray[Any]:
    """[H, W] or [H, W, 3]. A palette image gives its indices, an alpha channel is left out."""
    with fsspec.open(ref.file, "rb") as file:
        data = file.read()
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:  # Pillow says the latter of a broken chunk in a PNG
        raise ValueError(f"mask file {ref.file} cannot be read as an image: {error}") from error
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels


def _one_channel(pixels: NDArray[Any], ref: MaskRef) -> NDArray[Any]:
    if pixels.ndim != 2:
        raise ValueError(
            f"mask file {ref.file} is a colour image, expected one channel with a class number a pixel;"
            " AVSBench has these as labels_semantic"
        )
    return pixels


def _from_palette(
    pixels: NDArray[Any], palette: NDArray[np.integer], ref: MaskRef
) -> NDArray[np.integer]:
    """[H, W, 3] colours -> [H, W] rows of `palette`."""
    weights = np.array([1 << 16, 1 << 8, 1])
    numbers, keys = pixels.astype(int) @ weights, palette.astype(int) @ weights
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], numbers).clip(max=len(keys) - 1)
    classes = order[place]
    strange = keys[classes] != numbers
    if strange.any():
        colour = tuple(pixels[strange][0].tolist())
        raise ValueError(
            f"class map {ref.file}: colour {colour} is not in the palette of {len(palette)}"
        )
    return classes
