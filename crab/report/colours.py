"""A scale of colours in even steps: from worst to best, one for white paper and one for black.

The path runs through OKLab (Bjorn Ottosson, https://bottosson.github.io/posts/oklab/), where distances are those that
people see, and is cut into steps of the same length. Lightness only ever goes one way, so it is read without colour
vision too. The best stands out from the paper: dark on light, bright on dark.
"""

import math
from itertools import pairwise

LEVELS = 24
"""One more would not be seen: neighbours are 0.03 apart in OKLab, a just noticeable difference is about 0.02."""

Lab = tuple[float, float, float]

# (lightness, chroma, hue in degrees) of the worst, of the middle and of the best: yellow, teal, blue.
_LIGHT = ((0.83, 0.125, 95.0), (0.58, 0.095, 190.0), (0.33, 0.14, 285.0))
_DARK = ((0.44, 0.14, 285.0), (0.68, 0.11, 190.0), (0.92, 0.13, 100.0))
_FINE = 960


def levels(dark: bool) -> tuple[str, ...]:
    """LEVELS colours (#rrggbb) from the worst to the best."""
    return tuple(_hex(lab) for lab in _even(_DARK if dark else _LIGHT))


def level_of(share: float) -> int:
    """The level of a share from 0 (worst) to 1 (best); what lies beyond takes the last one."""
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def distance(one: str, other: str) -> float:
    """How different two colours (#rrggbb) look."""
    return math.dist(_lab(one), _lab(other))


def _even(stops: tuple[tuple[float, float, float], ...]) -> list[Lab]:
    """LEVELS places on the path through these stops, each as far from the last as the next from it."""
    path = [_on_path(stops, step / _FINE) for step in range(_FINE + 1)]
    lengths = [0.0]
    for before, after in pairwise(path):
        lengths.append(lengths[-1] + math.dist(before, after))
    wanted = [lengths[-1] * step / (LEVELS - 1) for step in range(LEVELS)]
    return [path[min(range(len(path)), key=lambda i: abs(lengths[i] - at))] for at in wanted]


def _on_path(stops: tuple[tuple[float, float, float], ...], share: float) -> Lab:
    """A bend through three stops in lightness, chroma and hue (Lagrange), as OKLab."""
    first, middle, last = (
        (1 - share) * (1 - 2 * share),
        4 * share * (1 - share),
        share * (2 * share - 1),
    )
    lightness, chroma, hue = (
        first * a + middle * b + last * c for a, b, c in zip(*stops, strict=True)
    )
    angle = math.radians(hue)
    return lightness, chroma * math.cos(angle), chroma * math.sin(angle)


def _hex(lab: Lab) -> str:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, part)))):02x}" for part in linear)


def _lab(colour: str) -> Lab:
    red, green, blue = (_linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    long = math.cbrt(0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue)
    middle = math.cbrt(0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue)
    short = math.cbrt(0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def _gamma(part: float) -> float:
    return 12.92 * part if part <= 0.0031308 else 1.055 * part ** (1 / 2.4) - 0.055


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
