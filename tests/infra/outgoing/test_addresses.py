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
