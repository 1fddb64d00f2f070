"""Which network the workers of several machines meet over: that of their node's address in the cluster.

Gloo meets over the address that the machine's own name resolves to. Debian and Ubuntu write 127.0.1.1 for it into
/etc/hosts, so that workers of two machines wait for each other on loopback; NCCL takes the first interface it finds.
"""

import os

import psutil
from ray.util import get_node_ip_address

VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}
"""How each names an interface; NCCL takes a plain word for the beginning of a name."""


def meet_by_node_address() -> None:
    """Name the interface of the node's address to gloo and NCCL, before this worker's process group is made.

    Variables that are set stay as they are; a node on loopback has no other machine to meet.
    """
    name = interface_of(get_node_ip_address())
    if name is not None:
        for variable, form in VARIABLES.items():
            os.environ.setdefault(variable, form.format(name))


def interface_of(address: str) -> str | None:
    """The interface that has an address; None for loopback, and where none has it (behind a translated address)."""
    if address.startswith("127.") or address == "::1":
        return None
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return name
    return None
