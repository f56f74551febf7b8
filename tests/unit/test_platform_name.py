"""The folder `platform/` must break nobody's `platform` module: at the root, under pytest, and in a Ray worker."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOTH = "import platform; assert platform.system(); import uuid, crab_platform; print(crab_platform.__path__[0])"


def test_nothing_beside_crab_platform() -> None:
    found = {path.name for path in (ROOT / "platform").iterdir() if path.name != "__pycache__"}
    assert found == {"crab_platform"}


@pytest.mark.parametrize("arguments", [["-c", BOTH], ["-P", "-c", BOTH]])
def test_child_process_at_the_root(arguments: list[str]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == ROOT / "platform" / "crab_platform"


def test_under_pytest() -> None:
    platform = importlib.import_module("platform")
    assert platform.python_version()
    assert "crab" not in str(platform.__file__)


@pytest.mark.ray
def test_ray_worker_with_working_dir(tmp_path: Path) -> None:
    """A small copy of the tree as working_dir: what a RayJob ships. In a child, since Ray is started once a process."""
    (tmp_path / "platform" / "crab_platform").mkdir(parents=True)
    (tmp_path / "platform" / "crab_platform" / "__init__.py").touch()
    script = f"""
import ray
env = {{"working_dir": {str(tmp_path)!r}, "env_vars": {{"PYTHONPATH": "platform"}}}}
# Not one that somebody left running on this machine: that is what the empty address would take.
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=env)
@ray.remote
def inside():
    import platform, crab_platform, os
    return platform.system(), os.path.isdir("platform"), bool(crab_platform.__path__)
print(ray.get(inside.remote(), timeout=60))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "('Linux', True, True)"
