"""The page of a sweep as a reader sees it: opened from the disk in a real headless browser, and looked at there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.browser import Browser, find_browser
from support.sweeps import HOSTILE, asha_sweep

from jobs.sweep_report import make_sweep_report

BEST = "best val/loss"
FIGURES = ("seeds", "response", "curves", "parallel coordinates", "timeline", "cost")


@dataclass(frozen=True, kw_only=True)
class Report:
    page: Path
    sweep: dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """24 trials of ASHA, one of them with a hostile reason; taken to another folder, the job's is gone."""
    if find_browser() is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CRAB_TEST_BROWSER")
    folder = tmp_path_factory.mktemp("sweep")
    sweep = asha_sweep()
    sweep["trials"][3]["reason"] = HOSTILE
    make_sweep_report(sweep, folder / "run")
    elsewhere = folder / "a folder of mine"
    shutil.move(folder / "run" / "report", elsewhere)
    shutil.rmtree(folder / "run")
    return Report(page=elsewhere / "index.html", sweep=sweep)


@pytest.fixture(scope="module")
def browser(report: Report) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, report: Report) -> Browser:
    """The report, just opened in a window of usual size."""
    browser.look()
    browser.open(report.page)
    return browser


def crowd() -> dict[str, Any]:
    """A sweep whose names and choices are many and long."""
    sweep = asha_sweep(150)
    names = [f"a_parameter_with_a_long_name_{i}" for i in range(9)]
    for number, trial in enumerate(sweep["trials"]):
        trial["number"] = 10**7 + number
        trial["config"] |= {name: f"choice {number % 40} of a long list" for name in names}
        trial["config"]["router_temperature"] = 1000 + number % 60
    space = sweep["space"]
    space["router_temperature"] = {"kind": "choice", "choices": list(range(1000, 1060))}
    space["num_heads"] = {"kind": "int", "low": 1_000_000, "high": 9_000_000, "log": False}
    space |= {name: {"kind": "choice", "choices": []} for name in names}
    one = sweep["confirmed"][0]
    sweep["confirmed"] += [{**one, "label": f"a baseline of a long name {n}"} for n in range(8)]
    return sweep


def column(page: Browser, name: str) -> list[str]:
    """The cells below a heading, as they stand."""
    found: list[str] = page.run(f"""
        (() => {{
            const heads = [...document.querySelectorAll('.sortable thead th')].map(head => head.innerText);
            const place = heads.findIndex(head => head.replace(/ [▲▼]$/, '') === {name!r});
            return [...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[place].innerText);
        }})()
    """)
    return found


def click(page: Browser, name: str) -> None:
    """On a heading."""
    page.run(f"""
        [...document.querySelectorAll('.sortable thead th button')]
            .find(button => button.innerText.replace(/ [▲▼]$/, '') === {name!r}).click()
    """)


def test_nothing_is_fetched_and_nothing_is_complained_of(page: Browser, report: Report) -> None:
    assert page.complaints == []
    assert page.requests == [report.page.absolute().as_uri()]
    assert page.run("document.title") == "Sweep tune-heads"
    assert page.run("document.querySelectorAll('main figure svg').length") == len(FIGURES)
    marks = page.run("document.querySelectorAll('#response ~ figure svg [data-trial]').length")
    assert marks == len(report.sweep["trials"])


def test_no_other_script_can_run(page: Browser) -> None:
    owned = page.run("""
        (() => {
            const script = document.createElement('script');
            script.textContent = 'document.title = "owned"';
            document.body.append(script);
            document.body.insertAdjacentHTML('beforeend', '<img src=x onerror="document.title=1">');
            return new Promise(tell => setTimeout(() => tell(document.title), 50));
        })()
    """)
    assert owned == "Sweep tune-heads"


def test_a_click_on_a_heading_sorts_with_the_unknown_last(page: Browser, report: Report) -> None:
    known = [t["best"] for t in report.sweep["trials"] if t["best"] is not None]
    texts = [f"{value:#.4g}" for value in sorted(known)]
    unknown = ["\N{EN DASH}"] * (len(report.sweep["trials"]) - len(known))
    assert column(page, "trial") == [str(number) for number in range(24)]
    click(page, BEST)
    assert column(page, BEST) == texts + unknown
    click(page, BEST)
    assert column(page, BEST) == texts[::-1] + unknown
    click(page, "trial")  # as numbers: 10 comes after 9
    assert column(page, "trial") == [str(number) for number in range(24)]
    click(page, "status")
    assert column(page, "status") == sorted(column(page, "status"))
    sorted_by = page.run("""
        [...document.querySelectorAll('.sortable th[aria-sort]')].map(head => head.innerText)
    """)
    assert len(sorted_by) == 1
    assert sorted_by[0].startswith("status")
    assert page.complaints == []


def test_a_trial_is_marked_everywhere_at_once(page: Browser) -> None:
    marked = """
        [...document.querySelectorAll('.on')].map(one =>
            [one.dataset.trial, (one.closest('svg') ?? one).tagName.toLowerCase()])
    """
    assert page.run(marked) == []
    page.run("document.querySelector('.sortable tr[data-trial=\"2\"]').click()")
    found = page.run(marked)
    # A mark, a curve and its end, a line over all parameters, a bar in time, one of cost; and its row.
    assert sorted(found) == sorted([["2", "svg"]] * 6 + [["2", "tr"]])
    faint = page.run(
        "getComputedStyle(document.querySelector('svg [data-trial]:not(.on)')).opacity"
    )
    assert float(faint) < 0.5
    page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.run(marked) == []


def test_it_says_the_same_without_a_script(
    browser: Browser, report: Report, tmp_path: Path
) -> None:
    """But for the hint on how to sort, and buttons that would do nothing."""
    text = report.page.read_text(encoding="utf-8")
    quiet = tmp_path / "index.html"
    quiet.write_text(re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL), encoding="utf-8")
    seen = []
    for file in (report.page, quiet):
        browser.look()
        browser.open(file)
        seen.append(browser.run("document.body.innerText").splitlines())
    with_script, without = seen
    assert [line for line in with_script if line not in without and line.strip()] == [
        "Click on a heading to sort, and on a trial to mark it in every figure."
    ]
    assert browser.run("document.querySelectorAll('button').length") == 0
    assert browser.run("document.querySelectorAll('.sortable tbody tr').length") == 24


@pytest.mark.parametrize("crowded", [False, True])
def test_no_labels_lie_on_each_other(
    browser: Browser, report: Report, tmp_path: Path, crowded: bool
) -> None:
    browser.look()
    browser.open(make_sweep_report(crowd(), tmp_path) if crowded else report.page)
    overlaps = browser.run("""
        [...document.querySelectorAll('main figure svg')].flatMap(svg => {
            const texts = [...svg.querySelectorAll('text:not(.callout)')].filter(text => text.textContent.trim());
            const boxes = texts.map(text => text.getBoundingClientRect());
            return texts.flatMap((text, i) => texts.slice(i + 1).filter((_, j) => {
                const [one, other] = [boxes[i], boxes[i + 1 + j]];
                return one.left < other.right - 1 && other.left < one.right - 1
                    && one.top < other.bottom - 2 && other.top < one.bottom - 2;
            }).map(other => [text.textContent, other.textContent]));
        })
    """)
    assert overlaps == []
    outside = browser.run("""
        [...document.querySelectorAll('main figure svg')].flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll('text, circle, rect:not(.cell), polyline')].filter(one => {
                const box = one.getBoundingClientRect();
                return box.left < frame.left - 1 || box.right > frame.right + 1
                    || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
            }).map(one => one.outerHTML);
        })
    """)
    assert outside == []


def test_it_fits_a_desk_and_a_telephone_in_light_and_dark(browser: Browser, report: Report) -> None:
    backgrounds, best = [], []
    for dark in (False, True):
        for width in (1280, 400):
            browser.look(width=width, height=800, dark=dark)
            browser.open(report.page)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.complaints == []
        backgrounds.append(brightness(browser, "getComputedStyle(document.body).backgroundColor"))
        best.append(
            brightness(browser, "getComputedStyle(document.querySelector('.dot.l23')).fill")
        )
    assert backgrounds[0] > 600 > 150 > backgrounds[1]
    assert best[0] < 250 < 500 < best[1]  # the best stands out from either paper


def brightness(browser: Browser, colour: str) -> int:
    found: str = browser.run(colour)
    return sum(int(part) for part in re.findall(r"\d+", found)[:3])


def test_it_is_small(report: Report) -> None:
    assert report.page.stat().st_size < 200_000
