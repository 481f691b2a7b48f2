"""Which IP addresses may be hosts on the internet, and which belong to inner networks.

The blocks are those of IANA's registries on 2026-07-18; `tests/infra/outgoing/test_addresses.py` has all their rows.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

SPECIAL_PURPOSE = tuple(
    ip_network(block)
    for block in (
        # https://www.iana.org/assignments/iana-ipv4-special-registry, all blocks, also those that are global.
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private use
        "100.64.0.0/10",  # shared address space
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link local
        "172.16.0.0/12",  # private use
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relay anycast, deprecated
        "192.168.0.0/16",  # private use
        "192.175.48.0/24",  # AS112, direct delegation
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "240.0.0.0/4",  # reserved, and limited broadcast
        # https://www.iana.org/assignments/multicast-addresses
        "224.0.0.0/4",
        # https://www.iana.org/assignments/iana-ipv6-special-registry, the blocks within 2000::/3. Addresses outside
        # 2000::/3 are never public, unless they wrap a public IPv4 address.
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID, …
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112, direct delegation
        "3fff::/20",  # documentation
    )
)
"""Blocks in which no tenant has a host."""

_GLOBAL_V6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
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
    """True if a host on the internet can have the address. IPv4 addresses that IPv6 wraps are unwrapped first."""
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        inner = _wrapped(address)
        return inner is not None and is_public(inner)
    return not any(address in block for block in SPECIAL_PURPOSE)


def is_private(address: IPv4Address | IPv6Address) -> bool:
    """True for loopback and private networks; not for link-local ones, which clouds use to give secrets to machines."""
    inner = _wrapped(address) if isinstance(address, IPv6Address) else None
    return any((inner or address) in network for network in _PRIVATE)


def _wrapped(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address to which a mapped, 6to4 or NAT64 address leads."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
