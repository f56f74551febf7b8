"""The report as a reader sees it: opened from the disk in a real headless browser, and looked at through it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.browser import Browser, find_browser
from support.evaluated_run import write_run, write_steps

from crab.samples import Sample, read_samples
from crab.synth.dataset import synthesise
from crab.tasks import TASKS
from jobs.report import make_report

EXAMPLES = 3
SEED = 2
"""Its first two clips have samples of all nine tasks."""


@dataclass(frozen=True, kw_only=True)
class Report:
    page: Path
    hostile: Sample
    unreadable: Sample
    """Its clip is damaged."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report, taken to another folder; run, clips and masks are gone."""
    if find_browser() is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set CRAB_TEST_BROWSER")
    folder = tmp_path_factory.mktemp("report")
    samples = read_samples(synthesise(folder / "shapes", 3, seed=SEED, workers=1, size=96))
    damaged = folder / "damaged.mp4"
    damaged.write_bytes(b"this is no film")
    captions = [sample for sample in samples if sample.task == "avcap"]
    unreadable = captions[1].model_copy(update={"video": str(damaged)})
    samples = [unreadable if sample.id == unreadable.id else sample for sample in samples]
    hostile = captions[0]
    questions = [sample for sample in samples if sample.task == "avqa"]
    run = folder / "runs" / "shapes"
    write_run(run, samples, hostile=[hostile.id], silent=[questions[0].id])
    write_steps(run / "steps.jsonl")
    make_report("shapes", str(folder / "runs"), EXAMPLES)
    elsewhere = folder / "a folder of mine"
    shutil.move(run / "report", elsewhere)
    shutil.rmtree(folder / "runs")
    shutil.rmtree(folder / "shapes")
    return Report(page=elsewhere / "index.html", hostile=hostile, unreadable=unreadable)


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


def test_nothing_is_broken_and_nothing_is_fetched(page: Browser, report: Report) -> None:
    broken = page.run("""
        Promise.all([...document.images].map(async image => {
            image.loading = 'eager';
            await image.decode().catch(() => {});
            return image.naturalWidth > 0 ? null : image.getAttribute('src');
        })).then(found => found.filter(src => src !== null))
    """)
    assert broken == []
    assert page.run("document.images.length") > 100
    lengths = page.run("""
        Promise.all([...document.querySelectorAll('audio')].map(audio => new Promise(tell => {
            audio.addEventListener('loadedmetadata', () => tell(audio.duration));
            audio.addEventListener('error', () => tell(audio.error.message));
            audio.load();
        })))
    """)
    assert len(lengths) >= 9
    assert all(isinstance(length, float | int) and 1 < length < 10.2 for length in lengths), lengths
    assert page.complaints == []
    # data: are the icons of Chromium's own player.
    allowed = (report.page.parent.as_uri(), "data:")
    assert [url for url in page.requests if not url.startswith(allowed)] == []


def test_every_task_has_its_examples_with_the_worst_first(page: Browser) -> None:
    shown = page.run("""
        Object.fromEntries([...document.querySelectorAll('main > section[id]')].map(section => [section.id,
            [...section.querySelectorAll('article')].map(one => [one.querySelector('h3').innerText,
                parseFloat(one.querySelector('.goodness')?.innerText.split(' ')[1] ?? '-1')])]))
    """)
    assert list(shown) == list(TASKS)
    assert max(map(len, shown.values())) == EXAMPLES
    assert [title for title, _ in shown["avqa"]][:2] == ["Worst 1 of 12", "Worst 2 of 12"]
    assert shown["avqa"][-1][0] == "Best 1 of 12"
    for examples in shown.values():
        worst = [goodness for title, goodness in examples if title.startswith("Worst")]
        best = [goodness for title, goodness in examples if title.startswith("Best")]
        assert worst == sorted(worst)
        assert all(value >= max(worst) for value in best)


def test_texts_of_models_are_shown_and_never_run(page: Browser, report: Report) -> None:
    assert page.run("document.title") == "Report of shapes"
    assert page.run("document.querySelectorAll('script, img[onerror], img[src=x]').length") == 0
    said = page.run("[...document.querySelectorAll('#avcap .said')].map(one => one.innerText)")
    assert any(
        text.startswith('<script>document.title = "owned"</script><img src=x') for text in said
    )


def test_masks_lie_on_the_frames_and_can_be_hidden_without_a_script(page: Browser) -> None:
    state = """
        (() => {
            const example = document.querySelector('#s4 article:has(img.predicted)');
            const mask = example.querySelector('img.predicted');
            const frame = mask.parentElement.querySelector('img');
            const place = one => JSON.stringify(one.getBoundingClientRect());
            return [getComputedStyle(mask).display, place(mask) === place(frame)];
        })()
    """
    assert page.run(state) == ["block", True]
    page.run("document.querySelector('#s4 article:has(img.predicted) .show-predicted').click()")
    assert page.run(state) == ["none", False]


def test_scores_stand_beside_the_best_constant_and_losses_are_drawn(page: Browser) -> None:
    rows = page.run("[...document.querySelectorAll('.scores tbody tr')].map(row => row.innerText)")
    assert len(rows) == len(TASKS)
    assert "segment_type_f" in rows[1]
    assert page.run("document.querySelectorAll('.curve polyline').length") == 1 + len(TASKS)


def test_a_clip_that_cannot_be_read_says_why(page: Browser, report: Report) -> None:
    notes = page.run(f"""
        [...document.querySelectorAll('#avcap article')]
            .filter(one => one.innerText.includes('{report.unreadable.id}'))
            .map(one => one.querySelector('.notes').innerText)
    """)
    assert len(notes) == 1
    assert "not_media" in notes[0]


def test_it_fits_a_telephone_and_the_dark(browser: Browser, report: Report) -> None:
    backgrounds = []
    for dark in (False, True):
        browser.look(width=390, height=800, dark=dark)
        browser.open(report.page)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        colour = browser.run("getComputedStyle(document.body).backgroundColor")
        backgrounds.append(sum(int(part) for part in colour[4:-1].split(",")))
    assert backgrounds[0] > 600 > 150 > backgrounds[1]


def test_it_is_small(report: Report) -> None:
    size = sum(file.stat().st_size for file in report.page.parent.rglob("*") if file.is_file())
    assert size < 2_000_000
