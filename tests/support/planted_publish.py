"""A cache whose writer is killed between its two writes, once: in the right order, and in the wrong one.

The product has no switch for the order, so it is planted from outside: `main` runs preprocess jobs on a Ray whose
workers start with `plant`. The folder of a cache names the order it gets; any other name is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

PACK_FIRST = "pack-then-commit"
COMMIT_FIRST = "commit-then-pack"


def plant() -> None:
    """Run by Ray at the start of every worker process."""
    from crab_platform.cache import FeatureCache

    FeatureCache.__init__.__kwdefaults__["publish"] = publish


def publish(store, pack, commit) -> None:
    cache = Path(store.url)
    first, second = (commit, pack) if cache.name == COMMIT_FIRST else (pack, commit)
    store.create(first.path, first.data)
    if cache.name in (PACK_FIRST, COMMIT_FIRST) and _claim(killed_mark(cache)):
        os.kill(os.getpid(), signal.SIGKILL)
    store.create(second.path, second.data)


def killed_mark(cache: Path) -> Path:
    """A file that exists once the writer of this cache has been killed."""
    return cache.with_name(f"{cache.name}.killed")


def _claim(mark: Path) -> bool:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main() -> None:
    """Arguments: a spec, then caches; one job for each, all on one cluster. Prints a JSON list of results."""
    import ray

    from jobs.run import run_spec
    from jobs.spec import load_spec

    spec, *caches = sys.argv[1:]
    hook = "support.planted_publish.plant"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": hook},
    )
    with contextlib.redirect_stdout(sys.stderr):  # Ray tells there of the worker that died
        results = [run_spec(load_spec(spec, [f"cache={cache}"])) for cache in caches]
        ray.shutdown()
    print(json.dumps(results))
