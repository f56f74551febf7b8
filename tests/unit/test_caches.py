"""The cache of a spec, opened: what is wrong with its key is said before any work begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from crab_platform.trust import make_key
from jobs.caches import open_cache
from jobs.spec_cache import SIGNING_KEY_VARIABLE, Cache


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "a"))
    return tmp_path / "a"


def test_a_key_of_another_zone_is_refused(key: Path, tmp_path: Path) -> None:
    public, other = make_key(key), make_key(tmp_path / "b")
    assert open_cache(Cache(url="c", zone="a", trust={"a": public})).signer
    assert open_cache(Cache(url="c", zone="a")).signer
    with pytest.raises(ValueError, match=f"not the private key of cache.zone 'a'.*{other}"):
        open_cache(Cache(url="c", zone="a", trust={"a": other}))


def test_a_key_that_is_not_there_or_open_to_others_is_refused(key: Path) -> None:
    with pytest.raises(ValueError, match=r"signing key of zone 'a'.*No such file"):
        open_cache(Cache(url="c", zone="a"))
    make_key(key)
    key.chmod(0o644)
    with pytest.raises(ValueError, match=f"chmod 600 {key}"):
        open_cache(Cache(url="c", zone="a"))
