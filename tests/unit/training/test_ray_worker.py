"""Workers of several machines meet over the network of their node's address."""

import socket

import psutil

from graftwork.training.ray_worker import interface_of


def test_an_address_names_its_interface() -> None:
    own = {
        (name, one.address)
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    }
    for name, address in own:
        assert interface_of(address) in {other for other, same in own if same == address}, name


def test_loopback_and_foreign_addresses_name_none() -> None:
    assert interface_of("127.0.0.1") is None
    assert interface_of("::1") is None
    assert interface_of("203.0.113.77") is None
