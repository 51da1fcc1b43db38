"""The HTTP client that shards are read with: it looks at the address of every hop before anything is asked of it.

A server that the user names answers with a redirect to wherever it likes, and a name resolves to whatever its owner
says. So the addresses themselves are checked, each time one is about to be used (`hosts.py` has the rule): of a host
written as an address, of what a name resolves to, and of the connection that is taken from the pool.

With an HTTP proxy (only where fsspec is configured to use one) the proxy resolves names, and decides.
"""

from __future__ import annotations

import socket
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp.resolver import ThreadedResolver

from diffgap_lightning.data.hosts import Nearness, RefusedAddressError, literal_nearness, nearness

# How near the next address of this request may be. One task makes all hops of a request, and no other request's.
_REACH: ContextVar[Nearness] = ContextVar("reach", default=Nearness.LOOPBACK)


async def http_session(**options: Any) -> aiohttp.ClientSession:
    """A session that refuses, as fsspec's `get_client`.

    Args:
        options: Of `aiohttp.ClientSession`, such as headers.
    """
    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(_begin)
    connector = _CheckingConnector(resolver=_CheckingResolver(), use_dns_cache=False)
    return aiohttp.ClientSession(
        **{**options, "connector": connector, "trace_configs": [*options.get("trace_configs", ()), trace]}
    )


async def _begin(session: aiohttp.ClientSession, context: SimpleNamespace, params: Any) -> None:
    """A request begins: its first address is the user's own choice."""
    _REACH.set(Nearness.LOOPBACK)


class _CheckingConnector(aiohttp.TCPConnector):
    """Checks the addresses that stand in the URL, and those of open connections."""

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        """A connection for one hop, whose address bounds the next one."""
        host = req.url.host or ""
        literal = literal_nearness(host)
        if literal is not None:
            _check(host, literal)
        if req.proxy is not None:
            return await super().connect(req, traces, timeout)
        connection = await super().connect(req, traces, timeout)
        try:
            peer = connection.transport and connection.transport.get_extra_info("peername")
            found = nearness(peer[0]) if peer else Nearness.PUBLIC  # no peer: it is closed, and answers nothing
            _check(host, found)
        except BaseException:
            connection.close()
            raise
        _REACH.set(min(_REACH.get(), found))
        return connection


class _CheckingResolver(ThreadedResolver):
    """Checks what a name resolves to, before anything is connected to."""

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
        """Addresses of a name, all of them allowed."""
        found = await super().resolve(host, port, family)
        for entry in found:
            _check(f"{host} ({entry['host']})", nearness(entry["host"]))
        return found


def _check(host: str, found: Nearness) -> None:
    """Refuse an address that is nearer than this request may reach.

    Raises:
        RefusedAddressError: naming it.
    """
    if found is Nearness.CREDENTIALS:
        raise RefusedAddressError(f"{host} is a link-local address, where machines keep their credentials")
    if found > _REACH.get():
        raise RefusedAddressError(
            f"redirects from a {_REACH.get().name.lower()} to a {found.name.lower()} address, {host}; if that is where "
            "the shards are, name it yourself"
        )
