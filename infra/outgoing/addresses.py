"""Which IP addresses lie on the internet, and which inside."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_V6 = IPv6Network("2000::/3")
_PRIVATE = (
    IPv4Network("127.0.0.0/8"),
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("100.64.0.0/10"),
    IPv6Network("::1/128"),
    IPv6Network("fc00::/7"),
)


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """True for what can be a host on the internet, by the registries of IANA and also where IPv6 wraps IPv4."""
    if isinstance(address, IPv6Address):
        if (inner := _wrapped(address)) is not None:
            return is_public(inner)
        if address not in _GLOBAL_V6:
            return False
    return address.is_global and not (address.is_private or address.is_multicast or address.is_reserved)


def is_private(address: IPv4Address | IPv6Address) -> bool:
    """True for loopback and private networks; not for link-local ones, where clouds tell machines their secrets."""
    inner = _wrapped(address) if isinstance(address, IPv6Address) else None
    return any((inner or address) in network for network in _PRIVATE)


def _wrapped(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped, 6to4 or NAT64 address leads to."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
