"""Draw a scene from (seed, clip index).

A clip's scene depends on nothing else: not on how many clips are made, nor on which worker makes it. Six of ten scenes
are *solos* with exactly one audio-visual event, as in AVE, among objects that are silent while seen or unseen while
heard; the others are *ensembles* without that limit. Only uniform numbers are drawn from numpy, the part of its
generators that is least likely to change between versions; a test pins the values of one scene.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from crab.synth.scene import CLASS_NAMES, COLUMNS, NUM_ROWS, Actor, Scene, seconds
from crab.tasks.spans import FULL, NUM_SECONDS

SCENE_VERSION = 1
"Raise it when the same (seed, index) gives another scene, picture or sound."

SOLO_SHARE = 0.6
ROLES_BESIDE_A_SOLO = ("silent", "silent", "silent", "unseen", "apart", "apart")
ROLES_IN_AN_ENSEMBLE = ("free", "free", "free", "free", "free", "silent", "unseen", "apart")

T = TypeVar("T")


class Dice:
    """Choices from uniform numbers, fixed by the seed for good."""

    def __init__(self, *seed: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


def make_scene(seed: int, index: int) -> Scene:
    """The scene of clip `index` of the data set `seed`. ValueError for negative numbers."""
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and clip index {index} given; both must be 0 or more")
    dice = Dice(seed, index)
    solo = dice.chance(SOLO_SHARE)
    count = 2 + dice.below(3)
    names = dice.sample(CLASS_NAMES, count)
    cells = dice.sample([(c, r) for c in range(len(COLUMNS)) for r in range(NUM_ROWS)], count)
    if solo:
        presence = [_solo(dice)] + [_role(dice, dice.pick(ROLES_BESIDE_A_SOLO)) for _ in names[1:]]
    else:
        presence = [_role(dice, dice.pick(ROLES_IN_AN_ENSEMBLE)) for _ in names]
    actors = [
        _actor(dice, name=name, cell=cell, visible=visible, sounding=sounding)
        for name, cell, (visible, sounding) in zip(names, cells, presence, strict=True)
    ]
    return Scene(
        seed=seed,
        index=index,
        background=(30 + dice.below(50), 30 + dice.below(50), 30 + dice.below(50)),
        actors=tuple(sorted(actors, key=lambda actor: CLASS_NAMES.index(actor.name))),
    )


def _actor(dice: Dice, *, name: str, cell: tuple[int, int], visible: int, sounding: int) -> Actor:
    column, row = cell
    radius = dice.between(0.085, 0.115)
    # Half a cell is 1/6 wide and 1/4 high; 0.01 is kept free, so neighbours never touch.
    sway_x, sway_y = 1 / 6 - radius - 0.01, 1 / 4 - radius - 0.01
    return Actor(
        name=name,
        column=column,
        row=row,
        visible=visible,
        sounding=sounding,
        radius=radius,
        centre_x=(column + 0.5) / len(COLUMNS),
        centre_y=(row + 0.5) / NUM_ROWS,
        sway_x=sway_x * dice.between(0.3, 1.0),
        sway_y=sway_y * dice.between(0.3, 1.0),
        sway_hz=dice.between(0.1, 0.35),
        phase=dice.between(0.0, 2 * math.pi),
        gain=dice.between(0.08, 0.15),
        detune=dice.between(0.985, 1.015),
    )


def _solo(dice: Dice) -> tuple[int, int]:
    """(visible, sounding) that share exactly one span of 2 to 10 seconds.

    Long events are likelier, as in AVE (two thirds of its events last all ten seconds). Before and after the event
    sight or sound, or neither, may already or still be there.
    """
    length = 2 + max(dice.below(NUM_SECONDS - 1), dice.below(NUM_SECONDS - 1))
    start = dice.below(NUM_SECONDS - length + 1)
    end = start + length
    visible = sounding = seconds(start, end)
    for free, before in ((start, True), (NUM_SECONDS - end, False)):
        extra = 1 + dice.below(free) if free else 0
        more = seconds(start - extra, start) if before else seconds(end, end + extra)
        stream = dice.pick(("visible", "sounding", "neither"))
        visible |= more if stream == "visible" else 0
        sounding |= more if stream == "sounding" else 0
    return visible, sounding


def _role(dice: Dice, role: str) -> tuple[int, int]:
    """(visible, sounding) of an object that is silent, unseen, seen and heard apart, or free of any rule."""
    visible, sounding = _some_runs(dice), _some_runs(dice)
    if role == "silent":
        return visible, 0
    if role == "unseen":
        return 0, sounding
    if role == "apart":
        if visible == FULL:
            visible = seconds(0, 5)
        return visible, FULL & ~visible
    return visible, sounding


def _some_runs(dice: Dice) -> int:
    """One run of 3 to 10 seconds, or two runs with a gap."""
    if dice.chance(0.65):
        length = 3 + dice.below(NUM_SECONDS - 2)
        start = dice.below(NUM_SECONDS - length + 1)
        return seconds(start, start + length)
    first, stop, again, end = sorted(dice.sample(range(NUM_SECONDS + 1), 4))
    return seconds(first, stop) | seconds(again, end)
