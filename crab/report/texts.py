"""Texts of models and data sets, made fit for a page. Escaping is the templates' business."""

from crab.report.views import Text
from crab.tasks.mask_answer import GROUP

MAX_CHARACTERS = 4000
"""Of a text. A model that never stops must not make a page that never ends."""
UNKNOWN = "\N{EN DASH}"
"""In place of a number that is not known."""
_SHORT_GROUP = "<mask_start>…<mask_end>"


def clean(text: str) -> str:
    """Text that can stand in a UTF-8 page: no control characters, no halves of characters, not too long."""
    kept = "".join(
        "\ufffd"
        if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"
        else c
        for c in text[:MAX_CHARACTERS]
    )
    more = len(text) - MAX_CHARACTERS
    return f"{kept} … and {more} characters more" if more > 0 else kept


def in_parts(text: str) -> Text:
    """The prose before the first tag, and the rest, in which a whole group of mask tokens is cut short."""
    prose, tag, rest = clean(text.replace(GROUP, _SHORT_GROUP)).partition("<")
    return Text(prose=prose.strip(), tagged=(tag + rest).strip())
