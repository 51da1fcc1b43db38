"""How near an address is to this machine: what a stranger's server may send a request to, and what never.

    PUBLIC < PRIVATE < LOOPBACK < CREDENTIALS

A user may name any of the first three. A redirect may lead only as near as the address that it comes from, so that a
public server reaches neither an intranet nor this machine's own services through us. The last are link-local addresses
and the few others at which cloud machines find their credentials; nothing is ever read from them.
"""

from __future__ import annotations

import ipaddress
import socket
from enum import IntEnum

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_CREDENTIALS = {ipaddress.ip_address(text) for text in ("fd00:ec2::254", "100.100.100.200")}  # not link-local
_CREDENTIAL_NAMES = ("metadata.google.internal",)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class RefusedAddressError(Exception):
    """An address that must not be asked. No `OSError`: the network did not fail, and trying again does not help."""


class Nearness(IntEnum):
    """Of an address, in the order of the module's text."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    CREDENTIALS = 3


def nearness(address: str | Address) -> Nearness:
    """How near an IP address is; an IPv4 address inside an IPv6 one counts as itself.

    Example:
        >>> [nearness(a).name for a in ("8.8.8.8", "10.0.0.1", "::1", "169.254.169.254")]
        ['PUBLIC', 'PRIVATE', 'LOOPBACK', 'CREDENTIALS']
    """
    ip = ipaddress.ip_address(address.partition("%")[0]) if isinstance(address, str) else address
    if isinstance(ip, ipaddress.IPv6Address):
        ip = _embedded(ip) or ip
    if ip.is_link_local or ip in _CREDENTIALS:
        return Nearness.CREDENTIALS
    if ip.is_loopback or ip.is_unspecified:  # 0.0.0.0 connects to this machine
        return Nearness.LOOPBACK
    return Nearness.PUBLIC if ip.is_global else Nearness.PRIVATE


def literal_nearness(host: str) -> Nearness | None:
    """How near a host is that is an address in any way of writing it, or a known name; None for another name."""
    if host.rstrip(".").lower() in _CREDENTIAL_NAMES:
        return Nearness.CREDENTIALS
    try:
        return nearness(host)
    except ValueError:
        try:
            return nearness(ipaddress.ip_address(socket.inet_aton(host)))  # 2852039166, 0xA9FEA9FE, 169.254.43518
        except OSError:
            return None


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for: mapped, 6to4, or through a NAT64 gateway."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour
