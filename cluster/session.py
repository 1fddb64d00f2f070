"""Session of a command: `with session(on) as here: here.run(stage, ...)`. Only this module starts or joins a Ray.

local                a private Ray, started and stopped by this command (cluster/private_ray.py)
job                  the Ray whose job this process is; the driver of a submitted job passes it
http(s)://HOST:PORT  a Ray cluster through its Jobs API: the whole command runs there (cluster/targets/ray_jobs.py)
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import ParamSpec, TypeVar

from graftwork.cluster.private_ray import ONE_MACHINE, QUIET, environment_of, private_ray
from graftwork.cluster.ray_address import HTTP_FORM, JOB, unknown_place
from graftwork.errors import ClusterError, ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A Ray that this process drives. `address` is host:port of its GCS; empty without a Ray."""

    on: str
    address: str

    def run(self, stage: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a stage in this process. Raises ConfigError for a root that a cluster would lose."""
        if self.on != "local":
            for argument in args:
                _require_lasting(self.on, getattr(argument, "root", None))
        return stage(*args, **kwargs)


@contextlib.contextmanager
def session(on: str = "local", num_cpus: int | None = None, *, needs_ray: bool = True) -> Iterator[Session]:
    """Have a Ray for the time of the block. SIGTERM ends the block as Ctrl-C does.

    `needs_ray` False: a stage of one process, for which no private Ray is started (5 s, and 0.5 s to stop it);
    the session's address is empty then. `num_cpus`: logical CPUs of a private Ray (default: the machine's, at least
    2). With http(s):// the block never starts: the graftwork command of this process runs over there, and SystemExit
    carries its exit code.
    Raises ConfigError for an address that is none of the forms, ClusterError when no Ray could be had.
    """
    if on.startswith(("http://", "https://")):
        from graftwork.cluster.targets.ray_jobs import run_command  # httpx: 40 ms that other commands need not wait for

        raise SystemExit(run_command(on, _command_line(on)))
    if on == "local" and not needs_ray:
        with terminated_as_interrupt():
            yield Session(on, "")
        return
    # Twice: ray.init installs a SIGTERM handler of its own.
    with terminated_as_interrupt(), _ray_of(on, num_cpus) as address, terminated_as_interrupt():
        yield Session(on, address)


def _require_lasting(on: str, root: object) -> None:
    """A stage on a cluster runs in a folder that is gone afterwards, maybe on another machine."""
    if isinstance(root, str) and "://" not in root and not Path(root).is_absolute():
        raise ConfigError(
            f"root={root} with --target {on}",
            "a relative folder is lost on a cluster",
            "root is s3://BUCKET/PREFIX, or the absolute path of a folder that all machines share",
            "--set root=s3://BUCKET/PREFIX",
        )


def _ray_of(on: str, num_cpus: int | None) -> contextlib.AbstractContextManager[str]:
    if on == "local":
        return private_ray(num_cpus)
    if on == JOB:
        return _surrounding_ray()
    raise unknown_place(on, f"local, or {HTTP_FORM}")


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


def _command_line(on: str) -> list[str]:
    """The arguments of this process if it is the graftwork command; a program has none that could be sent."""
    if Path(sys.argv[0]).name not in ("graftwork", "graftwork.exe"):
        raise ConfigError(
            f"on={on}",
            f"this process is {Path(sys.argv[0]).name}, not the graftwork command",
            "an HTTP address runs whole graftwork commands on its cluster",
            "call graftwork.cluster.targets.ray_jobs.run_command(on, argv)",
        )
    return sys.argv[1:]


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
