"""Where a command runs its work: `with session(on) as here: here.run(stage, ...)`. The only place that starts or joins Ray.

local                a private Ray, started and stopped by this command (cluster/local.py)
auto                 the Ray whose job this process is; the driver of a submitted job uses it
ray://HOST:PORT      a Ray cluster through Ray Client: the stage runs there as one task
http(s)://HOST:PORT  a Ray cluster through its Jobs API: the whole command runs there (cluster/jobs.py)
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import ParamSpec, TypeVar

from graftwork.cluster.local import private_ray
from graftwork.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A Ray that can be used now. `address` is host:port of its GCS (or Ray Client) server."""

    on: str
    address: str
    remote: bool = False

    def run(self, stage: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a stage where Ray is: in this process, or as a task of the cluster behind `ray://`."""
        return stage(*args, **kwargs)


@contextlib.contextmanager
def session(on: str = "local", num_cpus: int | None = None) -> Iterator[Session]:
    """Have a Ray for the time of the block. SIGTERM ends the block as Ctrl-C does.

    `num_cpus`: logical CPUs of a private Ray (default: the machine's, at least 2).
    Raises ConfigError for an address that is none of the four forms, ClusterError when no Ray could be had.
    """
    if on != "local":
        raise ConfigError(f"--on {on}", "not a place to run", "local, auto, ray://HOST:PORT or http(s)://HOST:PORT")
    # Twice: ray.init installs a SIGTERM handler of its own.
    with terminated_as_interrupt(), private_ray(num_cpus) as address, terminated_as_interrupt():
        yield Session(on, address)


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
