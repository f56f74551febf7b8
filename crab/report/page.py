"""The page: views through jinja2 with autoescape into one index.html."""

import base64
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from crab.report import overlay
from crab.report.files import FOLDER
from crab.report.views import Curve, Page

INDEX = "index.html"

_CURVE_POINTS = 150
"""More are averaged in groups: a page with 10^5 steps would be slow, and a line 300 pixels wide shows no more."""


def write_page(page: Page, folder: Path) -> Path:
    """Writes index.html into `folder`, beside the files that its views name, and returns its path."""
    return write_template(
        "page.html.jinja",
        folder,
        page=page,
        predicted_colour=overlay.hex_of(overlay.PREDICTED),
        true_colour=overlay.hex_of(overlay.TRUE),
    )


def write_template(name: str, folder: Path, script: str | None = None, **values: object) -> Path:
    """Writes index.html of a template into `folder` and returns its path.

    The template gets the text of the file `script` and its digest, so that the page's policy lets it run and no other.
    """
    environment = Environment(
        loader=PackageLoader("crab.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals["line"] = polyline
    source = (Path(__file__).parent / "templates" / script).read_text("utf-8") if script else ""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    # A script of ours has no values in it: what a sweep says stands in escaped attributes, which it reads.
    text = environment.get_template(name).render(
        script=Markup(source), script_digest=f"sha256-{digest}", **values
    )
    path = folder / INDEX
    path.write_text(text, encoding="utf-8")
    return path


def check_folder(folder: Path) -> None:
    """ValueError unless a page may take the place of `folder`: it is not there, is empty, or holds a page."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a page wants a folder")
    others = {path.name for path in folder.iterdir()} - {INDEX, FOLDER} if folder.exists() else ()
    if others:
        raise ValueError(
            f"{folder} holds {sorted(others)[0]!r}, which is no part of a page; give a new folder"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the place of the page in `folder` when all went well."""
    check_folder(folder)
    folder = folder.absolute()
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        if folder.exists():
            shutil.rmtree(folder)
        work.replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def polyline(curve: Curve, width: float, height: float) -> str:
    """The points of a curve for SVG: from its first to its last step, from 0 (or its least value) to its greatest."""
    points = _thinned(curve.points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min(0.0, *values), max(values)
    across, up = (steps[-1] - steps[0]) or 1.0, (high - low) or 1.0
    return " ".join(
        f"{width * (step - steps[0]) / across:.1f},{height * (1 - (value - low) / up):.1f}"
        for step, value in points
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    group = -(-len(points) // _CURVE_POINTS)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [
        (sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part))
        for part in parts
    ]
