"""A cluster behind ray://: the stage runs there as one task, since Ray Train and Tune need their driver inside."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from graftwork.cluster.address import host_and_port, refused, require_reachable, user_token
from graftwork.cluster.shipping import shipped
from graftwork.errors import ClusterError, GraftworkError

CONNECT_S = 10.0
POLL_S = 0.5

T = TypeVar("T")


@contextlib.contextmanager
def client_of(on: str) -> Iterator[str]:
    """Connect through Ray Client, shipping this code; yields host:port. Raises ClusterError within some 15 s."""
    import ray

    require_reachable(on)
    host, port = host_and_port(on)
    with user_token(), shipped() as folder:
        _connect(on, {"working_dir": str(folder)})
        try:
            yield f"{host}:{port}"
        finally:
            ray.shutdown()


def _connect(on: str, runtime_env: Mapping[str, object]) -> None:
    """`ray.init` with a time limit: with a wrong token it retries for half a minute."""
    import ray

    failed: list[Exception] = []

    def connect() -> None:
        try:
            ray.init(on, runtime_env=dict(runtime_env), logging_level="error", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            failed.append(error)

    thread = threading.Thread(target=connect, name="ray-client", daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if thread.is_alive():
        raise refused(on, f"no connection within {CONNECT_S:.0f} s")
    if failed:
        raise refused(on, str(failed[0]))


def run_there(stage: Callable[..., T], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> T:
    """Run a stage as a task of the cluster. Callbacks among `kwargs` are called here as the stage calls them."""
    import ray

    callbacks = {name: value for name, value in kwargs.items() if callable(value)}
    plain = {name: value for name, value in kwargs.items() if name not in callbacks}
    board = ray.remote(num_cpus=0)(_Board).remote()
    task = ray.remote(num_cpus=0, max_retries=0)(_run).remote(stage, args, plain, list(callbacks), board)
    while True:
        done, _ = ray.wait([task], timeout=POLL_S)
        for name, told in ray.get(board.take.remote()):
            callbacks[name](*told)
        if done:
            break
    try:
        outcome: T = ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GraftworkError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError("the cluster behind ray://", f"it lost the running stage ({error})") from error
    return outcome


class _Board:
    """Actor between the stage there and the callbacks here."""

    def __init__(self) -> None:
        self._told: list[tuple[str, tuple[Any, ...]]] = []

    def put(self, name: str, told: tuple[Any, ...]) -> None:
        self._told.append((name, told))

    def flush(self) -> None:
        """Answers once all earlier calls of the same caller are done."""

    def take(self) -> list[tuple[str, tuple[Any, ...]]]:
        told, self._told = self._told, []
        return told


def _run(stage: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], board: Any) -> T:
    """The task: the stage with callbacks that put what they are told on the board."""
    import ray

    def teller(name: str) -> Callable[..., None]:
        return lambda *told: board.put.remote(name, told)

    try:
        return stage(*args, **kwargs, **{name: teller(name) for name in names})
    finally:
        ray.get(board.flush.remote())  # calls of one caller arrive in order: all that was told is on the board now
