"""The chapter *Sharing a cache*: what it tells people to type works, in the order given, from an empty folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "docs" / "sharing.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", CHAPTER, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every command of the chapter, and what it printed."""
    folder = tmp_path_factory.mktemp("tour")
    (folder / "jobs").mkdir()
    shutil.copytree(ROOT / "jobs" / "specs", folder / "jobs" / "specs")
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    crab = folder / "crab"
    start = "from jobs.cli import main; main()"
    crab.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}" "$@"\n')
    crab.chmod(0o755)
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    env = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "COLUMNS": "160",
    }
    found: dict[str, str] = {}
    for command in "".join(BLOCKS).splitlines():
        done = subprocess.run(
            ["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        found[command] = done.stdout + done.stderr
    found["folder"] = str(folder)
    return found


def text_of(said: dict[str, str], start: str, nth: int = 0) -> str:
    return [text for command, text in said.items() if command.startswith(start)][nth]


@pytest.mark.ray
def test_every_command_of_the_chapter_works(said: dict[str, str]) -> None:
    assert len(said) > 15
    assert all(text for command, text in said.items() if command.startswith("crab"))


@pytest.mark.ray
def test_the_plans_say_what_the_chapter_says(said: dict[str, str]) -> None:
    plan = "crab plan jobs/specs/preprocess-shapes.yaml"
    assert "never seen" in text_of(said, plan, 0)
    assert "never seen" not in text_of(said, plan, 1)
    assert "sampling.num_frames" in text_of(said, plan, 2)


@pytest.mark.ray
def test_the_second_team_decodes_nothing(said: dict[str, str]) -> None:
    result = json.loads((Path(said["folder"]) / "work/runs/team-b/result.json").read_text())
    assert result["decoded_files"] == 0
    assert result["encoded"] == 0
    assert not list((Path(said["folder"]) / "work/cache-b").glob("packs/*/*"))


@pytest.mark.ray
def test_gc_that_only_shows_writes_nothing_and_the_pin_is_seen(said: dict[str, str]) -> None:
    assert "table-2" in text_of(said, "crab cache pins")
    assert "paper" in text_of(said, "crab cache gc work/cache")


def test_it_is_linked_from_the_readme() -> None:
    assert "(docs/sharing.md)" in (ROOT / "README.md").read_text()
