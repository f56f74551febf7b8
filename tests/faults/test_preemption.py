"""B8: a run is told that its end is near, by SIGTERM to its driver or by Ray, which drains a node: a checkpoint is
committed before the end comes, and no step that was told is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from servers.seaweedfs import free_ports
from support.crab_runs import wait_for
from support.tiny_training import Plan, run, write_llm

from crab_platform import checkpoint
from crab_platform.notice import Stopped
from crab_platform.storage import open_store

pytestmark = [pytest.mark.ray, pytest.mark.faults]

NOTICES = 10
WINDOW_S = 30

_DRIVER = """
import sys
from pathlib import Path
from support.crab_runs import wait_for
from support.tiny_training import Plan, run
from crab_platform.ray_cluster import connected
from crab_platform.training import Stopped

plan = eval(sys.argv[1])

def told(step):
    with Path(plan.out, "told").open("a") as file:
        file.write(f"{step}\\n")

with connected(num_cpus=3):
    try:
        run(plan, on_step=told, checkpoint_every=100_000)
    except Stopped as stopped:
        sys.exit(str(stopped))
"""


def told(plan: Plan) -> list[int]:
    file = Path(plan.out, "told")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def wait_for_steps(plan: Plan, count: int, process: subprocess.Popen[bytes]) -> None:
    while len(told(plan)) < count:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)


def test_sigterm_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(llm=write_llm(tmp_path / "llm"), out=str(tmp_path), steps=100_000, step_s=0.1)
    chance = random.Random(8)
    took_s = []
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = outside | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    for number in range(NOTICES):
        before = told(plan)
        with (tmp_path / f"said-{number}").open("wb") as said:
            driver = subprocess.Popen(
                [sys.executable, "-c", _DRIVER, repr(plan)], env=env, stderr=said
            )
            wait_for_steps(plan, len(before) + 1 + chance.randrange(20), driver)
            driver.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            status = driver.wait()
            took_s.append(time.monotonic() - sent)
        assert status == 1
        words = (tmp_path / f"said-{number}").read_text()
        assert "by SIGTERM, with a checkpoint in" in words
        now = told(plan)
        store = open_store(tmp_path / "run")
        marker = checkpoint.read(store, checkpoint.names(store)[-1])[0]
        assert marker.step == now[-1]
    steps = told(plan)
    assert steps == list(range(1, steps[-1] + 1))  # none lost, none done twice
    with capsys.disabled():
        print(
            f"\nB8: {NOTICES} SIGTERMs, {len(took_s)} checkpoints, 0 steps lost; "
            f"the driver had ended after {min(took_s):.1f} to {max(took_s):.1f} s"
        )


def test_workers_that_do_not_listen_are_noticed(tmp_path: Path) -> None:
    """Teeth: with workers that never ask (planted) there is no checkpoint when the window is over."""
    plan = Plan(
        llm=write_llm(tmp_path / "llm"),
        out=str(tmp_path),
        steps=100_000,
        step_s=0.1,
        is_deaf=True,
    )
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = outside | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, repr(plan)], env=env)
    wait_for_steps(plan, 1, driver)
    driver.send_signal(signal.SIGTERM)
    time.sleep(WINDOW_S)
    assert driver.poll() is None
    assert whole(tmp_path) == []
    driver.kill()
    driver.wait()


_LOOK_FOR_GROUP = """
import threading
import time
from ray.util import placement_group_table

def look():
    while not any(g["state"] == "PENDING" for g in placement_group_table().values()):
        time.sleep(0.2)
    Path(plan.out, "waits").touch()

threading.Thread(target=look, daemon=True).start()
"""


def test_sigterm_ends_a_run_that_waits_for_room(tmp_path: Path) -> None:
    """Nobody is there to hear of it, and nothing to save: a pod that is deleted must not sit out its grace."""
    plan = Plan(llm=write_llm(tmp_path / "llm"), out=str(tmp_path), steps=4)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = outside | {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    code = _DRIVER.replace("num_cpus=3", "num_cpus=1")  # for two workers
    code = code.replace("    try:\n", indent(_LOOK_FOR_GROUP, "    ") + "    try:\n", 1)
    with (tmp_path / "said").open("wb") as said:
        driver = subprocess.Popen([sys.executable, "-c", code, repr(plan)], env=env, stderr=said)
        try:
            wait_for((tmp_path / "waits").exists, "it to wait for room")
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(WINDOW_S) == 1
        finally:
            driver.kill()
    assert "by SIGTERM before a worker had begun" in (tmp_path / "said").read_text()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Ray with a head that runs no workers; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    (port,) = free_ports(1)
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def drain(cluster: Any, node: Any) -> None:
    """What an autoscaler does with a node that the cloud wants back."""
    command = f"""
import sys
from ray.scripts.scripts import main
sys.argv = ["ray", "drain-node", "--address", {cluster.address!r}, "--node-id", {node.node_id!r},
    "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted back",
    "--deadline-remaining-seconds", "{WINDOW_S}"]
main()
"""
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)


def test_a_drained_node_leaves_a_checkpoint_in_time(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(llm=write_llm(tmp_path / "llm"), out=str(tmp_path), steps=100_000, step_s=0.3)
    told: list[int] = []
    seen: list[tuple[int, int, int, float]] = []

    def newest() -> int:
        store = open_store(tmp_path / "run")
        return max((checkpoint.read_marker(store, n).step for n in whole(tmp_path)), default=0)

    # Ray adds nodes in the main thread only, so the run is in another.
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        node = cluster.add_node(num_cpus=2)
        training = pool.submit(
            run, plan, on_step=told.append, stop=stop, checkpoint_every=100_000, max_failures=0
        )
        try:
            for _ in range(NOTICES):
                so_far = len(told)
                while len(told) < so_far + 5:
                    assert not training.done(), training.exception()
                    time.sleep(0.1)
                other = cluster.add_node(num_cpus=2)
                noticed_at, noticed = time.monotonic(), told[-1]
                drain(cluster, node)
                while newest() < noticed and time.monotonic() < noticed_at + WINDOW_S:
                    time.sleep(0.1)
                committed_s = time.monotonic() - noticed_at
                time.sleep(max(0.0, WINDOW_S - committed_s))
                cluster.remove_node(node, allow_graceful=False)
                seen.append((noticed, newest(), told[-1], committed_s))
                node = other
        finally:
            stop.set()
        with pytest.raises(Stopped):
            training.result()
    assert len(seen) == NOTICES
    assert told == list(range(1, told[-1] + 1))
    for noticed, kept, last, committed_s in seen:
        assert committed_s < WINDOW_S
        assert noticed <= kept
        assert last - kept <= 1  # the step that was being done
    with capsys.disabled():
        print(
            f"\nB8: {NOTICES} nodes drained, a checkpoint after {min(s[3] for s in seen):.1f} to "
            f"{max(s[3] for s in seen):.1f} s of {WINDOW_S}; {sum(s[2] - s[1] for s in seen)} steps that were being "
            "done are done again; no failure counted"
        )


def whole(folder: Path) -> list[str]:
    return [p.parent.name for p in (folder / "run").glob(f"checkpoint_*/{checkpoint.COMPLETE}")]
