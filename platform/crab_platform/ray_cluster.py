"""Ray: the cluster that we are on, or one of our own on this machine for as long as a job lasts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

CODE_FOLDER = "CRAB_CODE_FOLDER"
"""Variable with a folder of packages that every worker shall import before the image's."""


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """A connection to Ray for the block.

    RAY_ADDRESS names the cluster (it is set in every pod of a RayJob); without it a local one is started, reachable
    from this machine only and only with its token, and stopped at the end. Inside a block that is connected already,
    this does nothing.
    """
    if ray.is_initialized():
        yield
        return
    # A cluster made by ray.init asks for a token by itself since Ray 2.59 (one made by `ray start` does not).
    # Its own progress bars and hints would come between ours.
    os.environ.setdefault("RAY_TQDM", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" in os.environ:
        # Code that is newer than the image lies on this pod only: Ray takes it to the others.
        newer = (
            sorted(map(str, Path(os.environ[CODE_FOLDER]).iterdir()))
            if CODE_FOLDER in os.environ
            else []
        )
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": newer} if newer else None,
        )
    else:
        _start_here(num_cpus or max(2, os.cpu_count() or 2))
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(num_cpus: int) -> None:
    """A cluster of this machine alone.

    Tried three times: Ray gives its agents 15 s to start, which is fixed in its code
    (ray-project/ray#65983) and too little on a machine that is busy with other things.
    """
    for last in (False, False, True):
        try:
            # The dashboard is not for looking at: Ray Train asks it whether its controller lives, and with it off
            # placement groups of stopped trials leak.
            ray.init(
                address="local",  # without it a cluster that somebody made here with `ray start` would be joined
                num_cpus=num_cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises this one as a bare Exception
            ray.shutdown()
            if last or type(error) is not Exception:
                raise
