"""Media files where they lie: what they are, whether they changed, and why they cannot be had."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from s3fs import S3FileSystem

from crab_platform.source import NOT_FOUND, UNREACHABLE, SourceError, fetch, is_local, versions


def make_file(path: Path, data: bytes, age_s: float = 60) -> str:
    path.write_bytes(data)
    then = time.time() - age_s
    os.utime(path, (then, then))
    return str(path)


def reason(url: str) -> str:
    with pytest.raises(SourceError) as caught, fetch(url):
        pass
    assert url.rpartition("/")[2] in caught.value.detail
    return caught.value.reason


@pytest.fixture
def closed_endpoint() -> Iterator[str]:
    """An address where nobody answers: taken, so that nobody else gets it, and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def s3_nowhere(closed_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """S3 whose server is down. Two retries would wait for seconds."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def server() -> Iterator[str]:
    """HTTP: /found has a body, /broken answers 500, all else 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = {"/found.mp4": 200, "/broken.mp4": 500}.get(self.path, 404)
            body = b"clip" if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_local_file_is_hashed_in_place(tmp_path):
    data = os.urandom(5_000_000)  # more than one block
    url = make_file(tmp_path / "clip.mp4", data)
    with fetch(url) as fetched:
        assert fetched.path == url
        assert fetched.sha256 == hashlib.sha256(data).hexdigest()
        assert fetched.num_bytes == len(data)
        assert fetched.version is not None
        assert versions([url]) == {url: fetched.version}
    assert Path(url).exists()


def test_file_url_is_the_path(tmp_path):
    path = make_file(tmp_path / "clip.mp4", b"clip")
    with fetch(f"file://{path}") as by_url, fetch(path) as by_path:
        assert by_url == by_path
    assert is_local(path)
    assert is_local(f"file://{path}")
    assert not is_local("s3://bucket/clip.mp4")


def test_changed_file_has_another_version(tmp_path):
    path = tmp_path / "clip.mp4"
    url = make_file(path, b"one")
    before = versions([url])[url]
    stat = path.stat()
    path.write_bytes(b"two")
    # Of the same size, with its old times put back: what remains is the change of the inode.
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert versions([url])[url] != before
    with fetch(url) as fetched:
        assert fetched.sha256 == hashlib.sha256(b"two").hexdigest()


def test_replaced_file_has_another_version(tmp_path):
    url = make_file(tmp_path / "clip.mp4", b"one")
    before = versions([url])[url]
    make_file(tmp_path / "other", b"two")
    (tmp_path / "other").replace(url)
    assert versions([url])[url] != before


def test_fresh_file_has_no_version_yet(tmp_path):
    """It could change again within one tick of the clock and look the same."""
    url = make_file(tmp_path / "clip.mp4", b"clip", age_s=0)
    with fetch(url) as fetched:
        assert fetched.version is None
        assert fetched.sha256 == hashlib.sha256(b"clip").hexdigest()


def test_missing_local_file(tmp_path):
    url = str(tmp_path / "none.mp4")
    assert versions([url]) == {url: None}
    assert reason(url) == NOT_FOUND


def test_a_folder_is_not_a_file(tmp_path):
    assert reason(str(tmp_path)) == UNREACHABLE


def test_errors_in_the_block_are_the_callers(tmp_path):
    url = make_file(tmp_path / "clip.mp4", b"clip")
    with pytest.raises(FileNotFoundError, match="mine"), fetch(url):
        raise FileNotFoundError("mine")


def test_s3_object(s3):
    url, none = s3.url("source/clip.mp4"), s3.url("source/none.mp4")
    S3FileSystem.clear_instance_cache()
    with fsspec.open(url, "wb") as file:
        file.write(b"one")
    first = versions([url, none])
    assert first[none] is None
    with fetch(url) as fetched:
        assert Path(fetched.path).read_bytes() == b"one"
        assert fetched.sha256 == hashlib.sha256(b"one").hexdigest()
        assert fetched.version == first[url]
        assert fetched.version is not None
    assert not Path(fetched.path).exists()
    assert reason(none) == NOT_FOUND
    with fsspec.open(url, "wb") as file:
        file.write(b"two")
    second = versions([url])[url]
    assert second not in (None, first[url])
    with fetch(url) as fetched:
        assert fetched.sha256 == hashlib.sha256(b"two").hexdigest()
        assert fetched.version == second


def test_copy_of_an_s3_object_goes_also_when_the_block_fails(s3):
    url = s3.url("source/failing.mp4")
    S3FileSystem.clear_instance_cache()
    with fsspec.open(url, "wb") as file:
        file.write(b"one")
    with pytest.raises(RuntimeError, match="mine"), fetch(url) as fetched:
        raise RuntimeError("mine")
    assert not Path(fetched.path).exists()


def test_s3_that_does_not_answer(s3_nowhere):
    url = "s3://bucket/clips/clip.mp4"
    assert versions([url]) == {url: None}
    assert reason(url) == UNREACHABLE


def test_s3_without_credentials(s3_nowhere, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert reason("s3://bucket/clips/clip.mp4") == UNREACHABLE


def test_http(server):
    with fetch(f"{server}/found.mp4") as fetched:
        assert fetched.sha256 == hashlib.sha256(b"clip").hexdigest()
    assert reason(f"{server}/none.mp4") == NOT_FOUND
    assert reason(f"{server}/broken.mp4") == UNREACHABLE


def test_http_that_does_not_answer(closed_endpoint):
    url = f"{closed_endpoint}/clip.mp4"
    assert versions([url]) == {url: None}
    assert reason(url) == UNREACHABLE
