"""Addresses of existing Rays: parsed, reached within seconds or refused with a reason."""

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from graftwork.errors import ClusterError, ConfigError

REACH_S = 5.0
FORMS = "local, http(s)://HOST:PORT of a Ray's dashboard, or k8s:CONTEXT/NAMESPACE"
HTTP_FORM = "http(s)://HOST:PORT of a Ray's dashboard"
JOB = "job"
"""`--on` of the command of a job: the Ray whose job the process is. Drivers pass it; people have no use for it."""


def unknown_place(on: str, forms: str = FORMS) -> ConfigError:
    """Return the error of a value of `--on` that is none of the forms."""
    if on == "auto" or on.startswith("ray://"):
        return ConfigError(
            f"--target {on}",
            "commands do not join a Ray as its driver or client",
            "a Ray runs commands as jobs, submitted to its dashboard: http://HOST:8265",
            f"--target http://{urlsplit(on).hostname or 'HOST'}:8265",
        )
    return ConfigError(f"--target {on}", "not a place to run", forms, "--target local, or --target http://HOST:8265")


def host_and_port(on: str) -> tuple[str, int]:
    """Raises ConfigError unless `on` is SCHEME://HOST:PORT (http and https have their usual ports)."""
    parts = urlsplit(on)
    try:
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or usual
    except (ValueError, KeyError):
        port = 0
    if not parts.hostname or not port or parts.username or parts.path not in ("", "/"):
        raise ConfigError(
            f"--target {on}", "not an address of a Ray", HTTP_FORM, "write for example http://127.0.0.1:8265"
        )
    return parts.hostname, port


def is_loopback(host: str) -> bool:
    """Whether the host is this machine by its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def token() -> str | None:
    """Of the environment, as Ray finds it; None where there is none. ConfigError for one that no header takes."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    found, where = os.environ.get("RAY_AUTH_TOKEN", ""), "RAY_AUTH_TOKEN"
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or ("~/.ray/auth_token" if mode == "token" else "")
    if not found.strip() and file:
        where = f"RAY_AUTH_TOKEN_PATH={file}"
        try:
            found = Path(file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(where, f"no token can be read there ({error})", "a file with the token alone") from None
    if not (found := found.strip()):
        return None
    if not found.isascii() or not found.isprintable() or " " in found:
        raise ConfigError(where, "it holds spaces, line breaks or letters beyond ASCII", "a token is one word of ASCII")
    return found


def refusal_error(on: str, why: str) -> ClusterError:
    """The cluster is there but does not take us."""
    token = "a token is set" if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") else "none is"
    return ClusterError(
        f"--target {on}",
        f"it refused the connection ({why.strip()[-300:]})",
        f"a Ray with RAY_AUTH_MODE=token takes only its own token ({token})",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's",
    )


def without_target(argv: Sequence[str]) -> list[str]:
    """Arguments of a command without its `--target` option."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip or argument.startswith("--target="):
            skip = False
        elif argument == "--target":
            skip = True
        else:
            kept.append(argument)
    return kept
