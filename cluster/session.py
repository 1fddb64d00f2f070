"""Session of a command: `with session(on) as here: here.run(stage, ...)`. Only this module starts or joins a Ray.

local                a private Ray, started and stopped by this command (cluster/private_ray.py)
job                  the Ray whose job this process is; the driver of a submitted job passes it
http(s)://HOST:PORT  a Ray cluster through its Jobs API: the whole command runs there (cluster/targets/ray_jobs.py)
"""

import contextlib
import ipaddress
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar
from urllib.parse import urlsplit

from graftwork.cluster.private_ray import ONE_MACHINE, QUIET, environment_of, private_ray
from graftwork.errors import ClusterError, ConfigError

P = ParamSpec("P")
T = TypeVar("T")

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
    """Return whether the host is this machine by its name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def token() -> str | None:
    """Return the token of the environment, as Ray finds it. Raises ConfigError for one that no header takes."""
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
    """Return the error of a cluster that answers and refuses this token."""
    token = "a token is set" if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") else "none is"
    return ClusterError(
        f"--target {on}",
        f"it refused the connection ({why.strip()[-300:]})",
        f"a Ray with RAY_AUTH_MODE=token takes only its own token ({token})",
        "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's",
    )


def without_target(argv: Sequence[str]) -> list[str]:
    """Arguments of a command without its `--target` option."""
    others: list[str] = []
    skip = False
    for argument in argv:
        if skip or argument.startswith("--target="):
            skip = False
        elif argument == "--target":
            skip = True
        else:
            others.append(argument)
    return others


@dataclass(frozen=True)
class Session:
    """A Ray that this process drives. `address` is host:port of its GCS; empty without a Ray."""

    on: str
    address: str

    def run(self, stage: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a stage in this process. Raises ConfigError for a root that a cluster would lose."""
        if self.on != "local":
            for root in (getattr(argument, "root", None) for argument in args):
                # A stage on a cluster runs in a folder that is gone afterwards, maybe on another machine.
                if isinstance(root, str) and "://" not in root and not Path(root).is_absolute():
                    raise ConfigError(
                        f"root={root} with --target {self.on}",
                        "a relative folder is lost on a cluster",
                        "root is s3://BUCKET/PREFIX, or the absolute path of a folder that all machines share",
                        "--set root=s3://BUCKET/PREFIX",
                    )
        return stage(*args, **kwargs)


@contextlib.contextmanager
def session(on: str = "local", num_cpus: int | None = None, *, needs_ray: bool = True) -> Iterator[Session]:
    """Provide a Ray for the time of the block. SIGTERM ends the block as Ctrl-C does.

    `needs_ray` False: a stage of one process, for which no private Ray is started (5 s, and 0.5 s to stop it);
    the session's address is empty then. `num_cpus`: logical CPUs of a private Ray (default: the machine's, at least
    2). With http(s):// the block never starts: the graftwork command of this process runs over there, and SystemExit
    carries its exit code.
    Raises ConfigError for an address that is none of the forms, ClusterError when no Ray could be had.
    """
    if on.startswith(("http://", "https://")):
        from graftwork.cluster.targets.ray_jobs import run_command  # httpx: 40 ms that other commands need not wait for

        if Path(sys.argv[0]).name not in ("graftwork", "graftwork.exe"):
            raise ConfigError(
                f"on={on}",
                f"this process is {Path(sys.argv[0]).name}, not the graftwork command",
                "an HTTP address runs whole graftwork commands on its cluster",
                "call graftwork.cluster.targets.ray_jobs.run_command(on, argv)",
            )
        raise SystemExit(run_command(on, sys.argv[1:]))
    if on == "local" and not needs_ray:
        with terminated_as_interrupt():
            yield Session(on, "")
        return
    if on not in ("local", JOB):
        raise unknown_place(on, f"local, or {HTTP_FORM}")
    ray = private_ray(num_cpus) if on == "local" else _surrounding_ray()
    # Twice: ray.init installs a SIGTERM handler of its own.
    with terminated_as_interrupt(), ray as address, terminated_as_interrupt():
        yield Session(on, address)


@contextlib.contextmanager
def _surrounding_ray() -> Iterator[str]:
    """The Ray that started this process: Ray sets RAY_ADDRESS for the driver of a submitted job."""
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        raise ClusterError(
            f"--target {JOB}", "RAY_ADDRESS is not set", "a driver passes it inside a job of Ray", "use --target local"
        )
    with environment_of({key: os.environ.get(key, value) for key, value in QUIET.items() if key not in ONE_MACHINE}):
        try:
            context = ray.init(address="auto", logging_level="error", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(f"--target {JOB}", f"no Ray at RAY_ADDRESS ({error})") from error
        try:
            yield str(context.address_info["gcs_address"])
        finally:
            ray.shutdown()


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt for the block, so that one path cleans up. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
