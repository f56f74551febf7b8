"""Ref-AVS samples: an expression, and the masks of the one object that it means; or of nothing.

Each form of expression is a function from a scene to every expression of that form that can be judged there: those that
one object fits, and those that none fits ("null"). Expressions that two objects fit are left out. Objects that are
heard but never seen count too, so "the circle" never is the seen one of two.
"""

from collections.abc import Callable
from dataclasses import dataclass

from crab.samples import Sample
from crab.synth.make import Dice
from crab.synth.mask_samples import mask_refs
from crab.synth.sample import make_sample, split_of
from crab.synth.scene import CLASS_NAMES, COLOURS, SHAPES, Actor, Scene
from crab.synth.words import listing, seen_and_heard
from crab.tasks import ref_avs
from crab.tasks.mask_answer import MaskItem, format_mask_answer
from crab.tasks.spans import runs

EXPRESSIONS_PER_CLIP = 2

UNSEEN_CLASSES = ("green square", "yellow triangle")
"Never meant in the train split, nor by a null expression; where the test split means them its subset is `unseen`."

SHORTEST_SIGHT_S = 5
"seconds for which an object must be visible to be meant"


@dataclass(frozen=True, kw_only=True)
class Expression:
    text: str
    meant: Actor | None
    "None: nothing in the scene fits"
    evidence: str


def by_class(scene: Scene) -> list[Expression]:
    return _described(scene, {f"the {name}": [*name.split()] for name in CLASS_NAMES})


def by_colour(scene: Scene) -> list[Expression]:
    return _described(scene, {f"the {colour} object": [colour] for colour in COLOURS})


def by_shape(scene: Scene) -> list[Expression]:
    return _described(scene, {f"the {shape}": [shape] for shape in SHAPES})


def _described(scene: Scene, words_by_text: dict[str, list[str]]) -> list[Expression]:
    evidence = f"Seen: {listing(actor.name for actor in scene.seen)}."
    return _unambiguous(
        {
            text: [actor for actor in scene.actors if set(words) <= set(actor.name.split())]
            for text, words in words_by_text.items()
        },
        evidence,
    )


def by_place(scene: Scene) -> list[Expression]:
    places = listing(f"{actor.name} {actor.place}" for actor in scene.seen)
    return _unambiguous(
        {
            f"the object {place}": [a for a in scene.seen if a.place == place]
            for place in ("on the left", "in the middle", "on the right")
        },
        f"Seen: {places}.",
    )


def by_first_sound(scene: Scene) -> list[Expression]:
    return _unambiguous({"the object that sounds first": _begin_at(scene, min)}, _beginnings(scene))


def by_last_sound(scene: Scene) -> list[Expression]:
    return _unambiguous(
        {"the object that starts to sound last": _begin_at(scene, max)}, _beginnings(scene)
    )


def by_class_and_first_sound(scene: Scene) -> list[Expression]:
    first = _begin_at(scene, min)
    # Of two that begin together neither sounds first, and neither clearly does not.
    fits = {
        f"the {actor.name} that sounds first": [actor] if actor in first else []
        for actor in scene.actors
        if len(first) == 1 or actor not in first
    }
    return _unambiguous(fits, _beginnings(scene))


def by_silence(scene: Scene) -> list[Expression]:
    silent = [actor for actor in scene.actors if not actor.sounding]
    return _unambiguous({"the object that never sounds": silent}, seen_and_heard(scene))


def by_class_and_silence(scene: Scene) -> list[Expression]:
    fits = {
        f"the {actor.name} that never sounds": [] if actor.sounding else [actor]
        for actor in scene.actors
    }
    return _unambiguous(fits, seen_and_heard(scene))


def _unambiguous(fitting: dict[str, list[Actor]], evidence: str) -> list[Expression]:
    return [
        Expression(text=text, meant=actors[0] if actors else None, evidence=evidence)
        for text, actors in fitting.items()
        if len(actors) < 2
    ]


def _start(actor: Actor) -> int:
    return runs(actor.sounding)[0][0]


def _begin_at(scene: Scene, extreme: Callable[[list[int]], int]) -> list[Actor]:
    """All objects whose sound begins at the earliest (min) or latest (max) beginning of the scene."""
    starts = [_start(actor) for actor in scene.heard]
    return [actor for actor in scene.heard if _start(actor) == extreme(starts)]


def _beginnings(scene: Scene) -> str:
    return f"Sounds begin: {listing(f'{actor.name} at {_start(actor)}' for actor in scene.heard)}."


FORMS: tuple[Callable[[Scene], list[Expression]], ...] = (
    by_class,
    by_colour,
    by_shape,
    by_place,
    by_first_sound,
    by_last_sound,
    by_class_and_first_sound,
    by_silence,
    by_class_and_silence,
)


def ref_avs_samples(scene: Scene) -> list[Sample]:
    """Up to two, of different forms. The second of every third clip is null: one in six."""
    dice = Dice(scene.seed, scene.index, 4)
    train = split_of(scene.index) == "train"
    samples: list[Sample] = []
    used: set[int] = set()
    for number in range(EXPRESSIONS_PER_CLIP):
        null = number == 1 and scene.index % 3 == 2
        options = {
            form: [e for e in make(scene) if (_is_fit_null(e) if null else _is_fit(e, train))]
            for form, make in enumerate(FORMS)
            if form not in used
        }
        # The test split's few chances to mean an unseen class are taken.
        unseen = {
            form: [e for e in some if e.meant and e.meant.name in UNSEEN_CLASSES]
            for form, some in options.items()
        }
        if number == 0 and any(unseen.values()):
            options = unseen
        forms = [form for form, some in options.items() if some]
        if not forms:
            continue
        form = dice.pick(forms)
        used.add(form)
        samples.append(_ref_avs(scene, dice.pick(options[form]), number))
    return samples


def _is_fit_null(expression: Expression) -> bool:
    return expression.meant is None and not any(name in expression.text for name in UNSEEN_CLASSES)


def _is_fit(expression: Expression, train: bool) -> bool:
    actor = expression.meant
    return (
        actor is not None
        and actor.visible.bit_count() >= SHORTEST_SIGHT_S
        and not (train and actor.name in UNSEEN_CLASSES)
    )


def _ref_avs(scene: Scene, expression: Expression, number: int) -> Sample:
    actor = expression.meant
    if actor is None:
        subset, found = "null", "Nothing fits."
        items = []
    else:
        subset = "unseen" if actor.name in UNSEEN_CLASSES else "seen"
        found = f"That is the {actor.name} {actor.place}."
        # The whole clip: the mask decoder sees for itself in which frames the object is in view.
        items = [MaskItem(start_s=0, end_s=scene.duration_s, names=(actor.name,))]
    return make_sample(
        scene,
        task="ref-avs",
        number=number,
        instruction=ref_avs.instruction(expression.text),
        reasoning=f"{expression.evidence} {found}",
        answer=format_mask_answer(items),
        label={"expression": expression.text, "subset": subset},
        masks=mask_refs(scene, [[actor] if actor else []] * scene.duration_s),
    )
