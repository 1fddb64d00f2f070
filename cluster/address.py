"""Addresses of existing Rays: parsed, reached within seconds or refused with a reason."""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from graftwork.errors import ClusterError, ConfigError

REACH_S = 5.0
FORMS = "local, auto, ray://HOST:PORT or http(s)://HOST:PORT"


def host_and_port(on: str) -> tuple[str, int]:
    """Raises ConfigError unless `on` is SCHEME://HOST:PORT (http and https have their usual ports)."""
    parts = urlsplit(on)
    try:
        port = parts.port or {"http": 80, "https": 443, "ray": 10001}[parts.scheme]
    except (ValueError, KeyError):
        port = 0
    if not parts.hostname or not port or parts.username or parts.path not in ("", "/"):
        raise ConfigError(f"--on {on}", "not an address of a Ray", FORMS, "write for example http://127.0.0.1:8265")
    return parts.hostname, port


def require_reachable(on: str) -> None:
    """Raise ClusterError unless something listens there. Takes at most `REACH_S`."""
    host, port = host_and_port(on)
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"--on {on}",
            f"nothing answers at {host}:{port} ({error})",
            "a running Ray's client server (ray://, usually port 10001) or dashboard (http://, usually 8265) is needed",
            "start it, open a tunnel to it, or use --on local",
        ) from None


def refused(on: str, why: str) -> ClusterError:
    """The cluster is there but does not take us."""
    token = "a token is set" if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") else "none is"
    return ClusterError(
        f"--on {on}",
        f"it refused the connection ({why.strip()[-300:]})",
        f"a Ray with RAY_AUTH_MODE=token takes only its own token ({token})",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's",
    )


@contextlib.contextmanager
def user_token() -> Iterator[None]:
    """Let Ray use the token in the environment, also where only the token and not the mode is set."""
    from graftwork.cluster.local import environment_of, token_reloaded

    given = any(os.environ.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    mode = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")} if given else {}
    with environment_of(mode), token_reloaded():
        yield


def without_on(argv: Sequence[str]) -> list[str]:
    """Arguments of a command without its `--on` option."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip or argument.startswith("--on="):
            skip = False
        elif argument == "--on":
            skip = True
        else:
            kept.append(argument)
    return kept
