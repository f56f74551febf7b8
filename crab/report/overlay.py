"""Masks as transparent pictures over a frame."""

import colorsys

import numpy as np

Colour = tuple[int, int, int]
Palette = list[tuple[int, int, int, int]]
"""RGBA."""

PREDICTED: Colour = (255, 138, 0)
TRUE: Colour = (0, 190, 255)
"""Orange and blue: told apart by nearly everybody, and rare beside each other in pictures."""

_EDGE = 3
_GOLDEN_ANGLE = 0.381966
"""Of a turn. Hues that far apart stay different however many classes there are."""


def filled(mask: np.ndarray, colour: Colour) -> tuple[np.ndarray, Palette]:
    """bool [H, W] -> (indices, palette): a veil with a firm edge."""
    indices = mask.astype(np.uint8)
    indices[edge(mask)] = 2
    return indices, [(0, 0, 0, 0), (*colour, 110), (*colour, 255)]


def outlined(mask: np.ndarray, colour: Colour) -> tuple[np.ndarray, Palette]:
    """bool [H, W] -> (indices, palette): the edge alone, so that what lies below can be seen."""
    return edge(mask).astype(np.uint8), [(0, 0, 0, 0), (*colour, 255)]


def coloured(classes: np.ndarray) -> tuple[np.ndarray, Palette]:
    """uint8 [H, W] class numbers -> (indices, palette): a colour a class with a white edge, class 0 transparent."""
    numbers = sorted({int(number) for number in np.unique(classes)} - {0})
    indices = np.zeros_like(classes)
    for index, number in enumerate(numbers, start=2):
        indices[classes == number] = index
        indices[edge(classes == number, 2)] = 1
    palette = [(0, 0, 0, 0), (255, 255, 255, 255)]
    return indices, palette + [(*class_colour(number), 205) for number in numbers]


def class_colour(number: int) -> Colour:
    """The colour of a class: the same on every page."""
    lightness = (0.62, 0.48, 0.72)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(number * _GOLDEN_ANGLE % 1, lightness, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def edge(mask: np.ndarray, width: int = _EDGE) -> np.ndarray:
    """The outermost `width` pixels inside of a mask; the frame's border is no edge of its own."""
    inner = np.pad(mask, width, mode="edge")
    for _ in range(width):
        inner = (
            inner
            & np.roll(inner, 1, 0)
            & np.roll(inner, -1, 0)
            & np.roll(inner, 1, 1)
            & np.roll(inner, -1, 1)
        )
    height, breadth = mask.shape
    return mask & ~inner[width : width + height, width : width + breadth]


def hex_of(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
