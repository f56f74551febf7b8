"""B6: a rank is frozen (SIGSTOP), so that all others wait for it in a collective.

Printed: seconds until it was found, and until training went on (goals 60 and 120).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_training import Plan, run, write_llm

from crab_platform import hang
from crab_platform.ray_cluster import connected

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    with connected(num_cpus=3):
        yield Plan(llm=write_llm(tmp_path / "llm"), out=str(tmp_path), freeze_at=3)


def test_a_frozen_rank_is_found_and_the_run_goes_on(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    at: dict[str, float] = {}

    def look(ended: threading.Event) -> None:
        while not ended.wait(0.2):
            for name, pattern in (("frozen", "frozen"), ("found", "run/hangs/*.txt")):
                if any(Path(plan.out).glob(pattern)):
                    at.setdefault(name, time.monotonic())

    ended = threading.Event()
    watcher = threading.Thread(target=look, args=(ended,))
    watcher.start()
    try:
        seen = run(plan, on_step=lambda step: at.setdefault(f"step {step}", time.monotonic()))
    finally:
        ended.set()
        watcher.join()
    assert seen.steps == [1, 2, 3, 4, 5, 6]
    (kept,) = (seen.folder / "hangs").iterdir()
    text = kept.read_text()
    assert re.search(r"^rank 1 .* has said nothing for", text)
    assert len(re.findall(r"^rank \d, pid \d+ on node", text, re.M)) == 2
    # Where rank 0 waits: in its step, or for the word whether to go on, which is sent after each.
    assert any(place in text for place in ("all_reduce", "backward", "engine", "broadcast"))
    with capsys.disabled():
        found, again = (at[name] - at["frozen"] for name in ("found", "step 5"))
        print(f"\nB6: found after {found:.1f} s, training again after {again:.1f} s")


def test_without_the_watch_nothing_is_found(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teeth: with the watch's patience planted at an hour, the run is still where it was when the watch, as it is, has
    long found it."""
    monkeypatch.setattr(hang, "SILENT_S", 3600.0)
    steps: list[int] = []
    thread = threading.Thread(target=lambda: run(plan, on_step=steps.append), daemon=True)
    thread.start()
    frozen = Path(plan.out, "frozen")
    while not frozen.exists():
        assert thread.is_alive()
        time.sleep(0.5)
    time.sleep(60)
    assert not list(Path(plan.out).glob("run/hangs/*"))
    # The rank froze after its update in the fourth step, which was told; nothing comes after it.
    assert max(steps, default=0) <= 4
    monkeypatch.undo()  # it is found now, and the run ends: a thread of it must not outlive the cluster
    thread.join()
    assert max(steps) == 6
    assert list(Path(plan.out).glob("run/hangs/*"))
