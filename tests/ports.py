"""Ports for tests, also of several processes at once."""

import itertools
import os
import socket
from collections.abc import Iterator

PORTS = range(20_000, 32_000)
"""Above those of Ray's workers, below those that the kernel hands to whoever asks for any."""

_start = os.getpid() * 97 % len(PORTS)
_next: Iterator[int] = itertools.cycle([*PORTS[_start:], *PORTS[:_start]])


def free_port() -> int:
    """A port of loopback that nobody listens on now; each call gives another, each process starts elsewhere.

    A port that the kernel picked may be given to another process between this answer and its use.
    """
    return next(port for port in _next if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: no wait for a closed connection
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
