from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from diffgap_lightning.data import urls
from diffgap_lightning.data.urls import check_url, expand_braces, expand_glob, is_remote, read_bytes, read_range


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "PIPE:rm -r x", "pipe://x"])
def test_pipe_addresses_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match="run a shell command and are never opened"):
        check_url(url)
    for read in (read_bytes, partial(read_range, offset=0, size=1)):
        with pytest.raises(ValueError, match="never opened"):
            read(url)


@pytest.mark.parametrize("url", ["ftp://host/x.tar", "simplecache::s3://b/x.tar", "ssh://h/x", "memory://x"])
def test_unknown_schemes_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected a path or http, https, s3, gs"):
        check_url(url)


METADATA = ("169.254.169.254", "2852039166", "0xA9FEA9FE", "169.254.43518", "[fe80::1]", "[::ffff:169.254.169.254]",
            "[fd00:ec2::254]", "metadata.google.internal", "user@169.254.169.254:80")  # fmt: skip


@pytest.mark.parametrize("host", METADATA)
def test_a_machine_s_own_credentials_are_never_fetched(host: str) -> None:
    """Each is another way to write the address of a cloud machine's metadata."""
    for read in (check_url, read_bytes, partial(read_range, offset=0, size=1)):
        with pytest.raises(ValueError, match="a link-local address"):
            read(f"http://{host}/latest/x.tar")
    assert check_url("http://169.253.1.1/x.tar") == "http://169.253.1.1/x.tar"


def test_paths_and_known_schemes_pass() -> None:
    assert check_url("file:///a/b.tar") == "/a/b.tar"
    assert [check_url(u) for u in ("a/b:c.tar", "s3://b/k.tar", "HTTPS://h/x")] == [
        "a/b:c.tar",
        "s3://b/k.tar",
        "HTTPS://h/x",
    ]
    assert [is_remote(u) for u in ("gs://b/x", "HTTPS://h/x", "/a", "a:b")] == [True, True, False, False]


def test_braces_and_globs(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c[1].tar", "d.txt"):
        (tmp_path / name).touch()
    assert expand_braces("x-{08..10}-{a,b}.tar")[:3] == ["x-08-a.tar", "x-08-b.tar", "x-09-a.tar"]
    assert [Path(p).name for p in expand_glob(f"{tmp_path}/*.tar")] == ["a.tar", "b.tar", "c[1].tar"]
    assert expand_glob(f"{tmp_path}/c[1].tar") == [f"{tmp_path}/c[1].tar"]
    assert expand_glob("http://h/x.tar?token=*") == ["http://h/x.tar?token=*"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        expand_glob(f"{tmp_path}/*.zip")
    with pytest.raises(ValueError, match="braces do not match"):
        expand_braces("x-{0..3.tar")


def test_a_range_beyond_the_file_is_refused_before_allocation(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_range(str(tmp_path / "x"), 3, 4).tobytes() == b"3456"
    with pytest.raises(OSError, match="truncated: the file has 10 bytes"):
        read_range(str(tmp_path / "x"), 0, 10**13)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_http_is_read_even_without_range_requests(tmp_path: Path, server: str) -> None:
    pytest.importorskip("aiohttp")
    data = np.arange(5000, dtype=np.uint8).tobytes()
    (tmp_path / "x.tar").write_bytes(data)
    assert read_bytes(f"{server}/x.tar") == data
    assert read_range(f"{server}/x.tar", 1000, 50).tobytes() == data[1000:1050]
    with pytest.raises(OSError, match="truncated"):
        read_range(f"{server}/x.tar", 4990, 50)
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{server}/y.tar")


def test_network_errors_are_tried_again_and_missing_files_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flaky:
        def __init__(self, error: Exception) -> None:
            self.error, self.calls = error, 0

        def cat_file(self, url: str) -> bytes:
            self.calls += 1
            if self.calls < 3:
                raise self.error
            return b"ok"

    monkeypatch.setattr(urls, "RETRY_DELAYS", (0.0, 0.0))
    flaky, gone = Flaky(RuntimeError("reset")), Flaky(FileNotFoundError("x"))
    monkeypatch.setattr(urls, "_remote", lambda url: flaky)
    assert read_bytes("s3://b/x") == b"ok"
    monkeypatch.setattr(urls, "_remote", lambda url: gone)
    with pytest.raises(FileNotFoundError):
        read_bytes("s3://b/x")
    assert gone.calls == 1
