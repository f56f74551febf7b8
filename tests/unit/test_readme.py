"""What the README tells people to type must exist."""

import re
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from jobs.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_make_targets_exist() -> None:
    named = set(re.findall(r"make ([a-z-]+)", README))
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    known = set(re.findall(r"make ([a-z-]+)", shown.stdout))
    assert {"demo", "test", "check"} <= named
    assert named <= known


def test_commands_and_options_exist() -> None:
    lines = [line.strip() for line in README.splitlines() if line.strip().startswith("crab ")]
    assert len(lines) >= 5
    for line in lines:
        command = line.split()[1]
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z]+", line):
            assert option in text, line
        for spec in re.findall(r"jobs/specs/\S+\.yaml", line):
            assert (ROOT / spec).is_file(), line


def test_the_demo_types_what_the_readme_says() -> None:
    demo = (ROOT / "jobs" / "demo.sh").read_text()
    for spec in re.findall(r"crab run (jobs/specs/\S+\.yaml)$", README, re.MULTILINE):
        assert f"crab run {spec}" in demo


def test_files_named_exist() -> None:
    links = re.findall(r"\]\(([^)h#][^)]*)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_tour_in_the_help_names_what_exists() -> None:
    tour = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    specs = re.findall(r"jobs/specs/\S+\.yaml", tour)
    assert len(specs) >= 4
    assert all((ROOT / spec).is_file() for spec in specs)
    named = set(re.findall(r"crab ([a-z]+) ", tour))
    assert {"synth", "run", "report", "import"} <= named
    for command in named:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
