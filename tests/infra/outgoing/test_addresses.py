"""Which addresses are public, private, or neither."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest

from infra.outgoing.addresses import SPECIAL_PURPOSE, is_private, is_public


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "127.0.0.1",
        "127.8.8.8",
        "100.64.0.1",
        "::1",
        "fd00::1",
        "::ffff:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::10.0.0.1",
        "2002:7f00:1::",
    ],
)
def test_private_addresses_are_known_in_every_wrapping(address: str) -> None:
    assert not is_public(ip_address(address))
    assert is_private(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "169.254.169.254",
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "::",
        "fe80::1",
        "fe80::1%1",
        "ff02::1",
        "::ffff:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "2002:a9fe:a9fe::",
    ],
)
def test_special_addresses_are_neither_public_nor_private(address: str) -> None:
    assert not is_public(ip_address(address))
    assert not is_private(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("192.0.0.9", "192.0.2.1", "192.31.196.1", "192.52.193.1", "192.88.99.1", "192.175.48.1", "198.18.0.1"),
        *("198.51.100.1", "203.0.113.1", "240.0.0.1", "2001::1", "2001:1::1", "2001:20::1", "2001:db8::1"),
        *("2002:101:101::", "2620:4f:8000::1", "3fff::1", "3fff:fff::1", "5f00::1", "fec0::1", "64:ff9b:1::1"),
        *(
            "::127.0.0.1",
            "::1.1.1.1",
            "100::1",
            "100:0:0:1::1",
            "::ffff:192.88.99.1",
            "64:ff9b::203.0.113.1",
            "4000::1",
        ),
    ],
)
def test_reserved_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


# The address blocks of all rows of iana-ipv4-special-registry-1.csv and iana-ipv6-special-registry-1.csv, as published
# by IANA on 2026-07-18.
REGISTRIES = """
0.0.0.0/8 0.0.0.0/32 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.0.0/29
192.0.0.8/32 192.0.0.9/32 192.0.0.10/32 192.0.0.170/32 192.0.0.171/32 192.0.2.0/24 192.31.196.0/24 192.52.193.0/24
192.88.99.0/24 192.88.99.2/32 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4
255.255.255.255/32
::1/128 ::/128 ::ffff:0:0/96 64:ff9b::/96 64:ff9b:1::/48 100::/64 100:0:0:1::/64 2001::/23 2001::/32 2001:1::1/128
2001:1::2/128 2001:1::3/128 2001:2::/48 2001:3::/32 2001:4:112::/48 2001:10::/28 2001:20::/28 2001:30::/28 2001:db8::/32
2002::/16 2620:4f:8000::/48 3fff::/20 5f00::/16 fc00::/7 fe80::/10
"""
# Addresses of these blocks lead to IPv4 addresses, which are judged.
WRAPPING = {ip_network("::ffff:0:0/96"), ip_network("64:ff9b::/96")}


def test_the_list_is_ianas() -> None:
    registered = {ip_network(block) for block in REGISTRIES.split()} - WRAPPING
    for block in registered:
        assert not is_public(block[0]), block
        assert not is_public(block[-1]), block
    multicast = {ip_network("224.0.0.0/4")}
    assert set(SPECIAL_PURPOSE) - registered == multicast


def test_the_list_has_all_blocks_that_python_knows_as_not_global() -> None:
    for block in SPECIAL_PURPOSE:
        for address in (block[0], block[-1]):
            assert not is_public(address)
    known = [*_constants("_IPv4Constants"), *_constants("_IPv6Constants")]
    assert len(known) > 20
    for network in known:
        for address in (network[0], network[-1]):
            assert not is_public(address) or address in ip_network("::ffff:0:0/96"), address


def _constants(name: str) -> list[IPv4Network | IPv6Network]:
    found: list[IPv4Network | IPv6Network] = getattr(ipaddress, name)._private_networks
    return found


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"]
)
def test_hosts_on_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))
