"""Redirects and names that lead to other addresses than the one that the user named, from real local servers.

A machine without a network has no public address: 127.0.0.2 stands for one here, and 127.0.0.3 for an intranet's.
"""

from __future__ import annotations

import http.server
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import unquote

import pytest

from diffgap_lightning.data import hosts
from diffgap_lightning.data.hosts import Nearness, literal_nearness, nearness
from diffgap_lightning.data.urls import file_size, open_binary, read_bytes, read_range

pytest.importorskip("aiohttp")
DATA = bytes(range(256)) * 8
ROLES = {"127.0.0.2": Nearness.PUBLIC, "127.0.0.3": Nearness.PRIVATE}


class Server(http.server.ThreadingHTTPServer):
    """Answers with `DATA`, or with a redirect to whatever follows `/to/`."""

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), Handler)
        self.asked: list[str] = []
        self.url = f"http://{host}:{self.server_port}"

    def to(self, url: str) -> str:
        return f"{self.url}/to/{url}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        target = unquote(self.path.partition("/to/")[2])
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.send_header("Content-Length", "0" if target else str(len(DATA)))
        self.end_headers()
        if not target and self.command == "GET":
            self.wfile.write(DATA)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *args: object) -> None: ...


@contextmanager
def serve(host: str) -> Iterator[Server]:
    try:
        server = Server(host)
    except OSError as error:
        pytest.skip(f"{host} is no address of this machine ({error})")
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Server]]:
    """One in each role."""
    real = hosts.nearness

    def by_role(address: Any) -> Nearness:
        return ROLES.get(str(address)) if str(address) in ROLES else real(address)  # type: ignore[return-value]

    monkeypatch.setattr("diffgap_lightning.data.hosts.nearness", by_role)
    monkeypatch.setattr("diffgap_lightning.data.http_client.nearness", by_role)
    with ExitStack() as stack:
        names = {"public": "127.0.0.2", "private": "127.0.0.3", "loopback": "127.0.0.1"}
        yield {name: stack.enter_context(serve(host)) for name, host in names.items()}


READERS = (read_bytes, lambda url: read_range(url, 0, 10), file_size, lambda url: open_binary(url).read(1))


@pytest.mark.parametrize(("first", "last"), [("loopback", "loopback"), ("loopback", "public"), ("private", "public")])
def test_redirects_to_as_far_or_further_are_followed(servers: dict[str, Server], first: str, last: str) -> None:
    url = servers[first].to(f"{servers[last].url}/x.tar")
    assert read_bytes(url) == DATA
    assert read_range(url, 100, 50).tobytes() == DATA[100:150]
    assert file_size(url) == len(DATA)
    assert open_binary(url).read() == DATA


@pytest.mark.parametrize(("first", "last"), [("public", "private"), ("public", "loopback"), ("private", "loopback")])
def test_a_redirect_to_a_nearer_address_is_not_followed(servers: dict[str, Server], first: str, last: str) -> None:
    for read in READERS:
        with pytest.raises(PermissionError, match=f"redirects from a {first} to a {last} address.*name it yourself"):
            read(servers[first].to(f"{servers[last].url}/admin"))
    assert servers[last].asked == []
    assert len(servers[first].asked) <= len(READERS) + 2  # not tried again (sizes are asked for twice, HEAD and GET)


@pytest.mark.parametrize("host", ["localhost", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1", "2130706433"])
def test_this_machine_by_another_name_is_not_nearer(servers: dict[str, Server], host: str) -> None:
    with pytest.raises(PermissionError, match="to a loopback address"):
        read_bytes(servers["public"].to(f"http://{host}:{servers['loopback'].server_port}/admin"))
    assert servers["loopback"].asked == []


def test_every_hop_counts_and_so_does_an_open_connection(servers: dict[str, Server]) -> None:
    """The user has read from both servers, and connections to both are open."""
    public, loopback = servers["public"], servers["loopback"]
    assert read_bytes(f"{loopback.url}/x.tar") == read_bytes(f"{public.url}/x.tar") == DATA
    assert read_bytes(public.to(public.to(f"{public.url}/x.tar"))) == DATA
    with pytest.raises(PermissionError, match="from a public to a loopback"):
        read_bytes(loopback.to(public.to(f"{loopback.url}/admin")))
    with pytest.raises(PermissionError, match="from a public to a loopback"):
        read_bytes(public.to(f"{loopback.url}/admin"))
    assert "/admin" not in loopback.asked
    assert read_bytes(f"{loopback.url}/x.tar") == DATA  # what the user names is read as before


CREDENTIALS = ("169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[fd00:ec2::254]",
               "metadata.google.internal", "100.100.100.200", "2852039166")  # fmt: skip


@pytest.mark.parametrize("host", CREDENTIALS)
def test_no_redirect_leads_to_a_machine_s_credentials(host: str) -> None:
    with serve("127.0.0.1") as server:
        with pytest.raises(PermissionError, match="is a link-local address, where machines keep their credentials"):
            read_bytes(server.to(f"http://{host}/latest/meta-data"))
        assert len(server.asked) == 1


def test_no_name_leads_to_a_machine_s_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a name decides what it resolves to; one good address among several does not make it good."""
    real = socket.getaddrinfo
    rows = {
        "bad.example": ["169.254.169.254"],
        "both.example": ["127.0.0.1", "169.254.169.254"],
        "good.example": ["127.0.0.1"],
    }

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in rows:
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in rows[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with serve("127.0.0.1") as server:
        assert read_bytes(f"http://good.example:{server.server_port}/x.tar") == DATA
        for name in ("bad.example", "both.example"):
            for url in (f"http://{name}:{server.server_port}/x", server.to(f"http://{name}:{server.server_port}/x")):
                with pytest.raises(PermissionError, match=rf"{name} \(169.254.169.254\) is a link-local address"):
                    read_bytes(url)
        assert "/x" not in server.asked


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", "PUBLIC"), ("2606:4700::1111", "PUBLIC"), ("64:ff9b::808:808", "PUBLIC"),
        ("10.0.0.1", "PRIVATE"), ("172.16.0.1", "PRIVATE"), ("192.168.1.1", "PRIVATE"), ("100.64.0.1", "PRIVATE"),
        ("fd12::1", "PRIVATE"), ("::ffff:10.0.0.1", "PRIVATE"), ("2002:a00:1::", "PRIVATE"),
        ("127.0.0.1", "LOOPBACK"), ("127.9.9.9", "LOOPBACK"), ("0.0.0.0", "LOOPBACK"), ("::1", "LOOPBACK"),
        ("::", "LOOPBACK"), ("::ffff:127.0.0.1", "LOOPBACK"),
        ("169.254.0.1", "CREDENTIALS"), ("fe80::1%eth0", "CREDENTIALS"), ("::ffff:169.254.169.254", "CREDENTIALS"),
        ("2002:a9fe:a9fe::", "CREDENTIALS"), ("fd00:ec2::254", "CREDENTIALS"), ("100.100.100.200", "CREDENTIALS"),
    ],
)  # fmt: skip
def test_how_near_an_address_is(address: str, expected: str) -> None:
    assert nearness(address).name == expected
    assert literal_nearness(address) is nearness(address)
    if "%" not in address:
        assert nearness(ipaddress.ip_address(address)).name == expected


def test_names_are_no_addresses() -> None:
    assert literal_nearness("localhost") is literal_nearness("example.org") is None
    assert literal_nearness("Metadata.Google.Internal.") is Nearness.CREDENTIALS
