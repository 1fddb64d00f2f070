"""The places of the conformance suite, all real: this machine, a Ray by its address, KubeRay by its API server."""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from graftwork.cluster.jobs.models import Attempt
from graftwork.cluster.jobs.packaging import build_wheel
from graftwork.cluster.spec import ClusterSpec
from graftwork.cluster.targets.ray_jobs import RayJobsTarget
from graftwork.cluster.targets.ray_jobs_api import JobsApi
from tests.backends.local_target import Ground
from tests.ports import free_port

CANARY = "canary-5f1d9c7b3e"


@contextlib.contextmanager
def local() -> Iterator[Ground]:
    """The attempt that waits is one whose client was killed before it started the driver."""
    with (
        tempfile.TemporaryDirectory(prefix="gwc-") as cache,
        _environment({"AWS_SECRET_ACCESS_KEY": CANARY, "GRAFTWORK_CACHE": cache}),
    ):
        yield Ground("local", ClusterSpec(), lambda _: contextlib.nullcontext(), secrets={"key": CANARY})


@contextlib.contextmanager
def address() -> Iterator[Ground]:
    """A Ray head with a token, behind a relay that can be cut."""
    from tests.k8s.ray_head import Head

    head = Head(token=f"{CANARY}-{os.urandom(8).hex()}")
    try:
        head.start()
        relay = Relay(urlsplit(head.address).port or 0)
        with _environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}):
            relay.open()
            try:
                yield Ground(
                    relay.address,
                    ClusterSpec(),
                    lambda attempt: _without_room(relay.address, attempt),
                    relay.close,
                    relay.open,
                    {"token": head.token},
                )
            finally:
                relay.close()
    finally:
        head.remove()


@contextlib.contextmanager
def kuberay() -> Iterator[Ground]:
    """A real API server with a fake operator."""
    try:
        from tests.k8s.cluster import kube_cluster
        from tests.k8s.commands import CLUSTER
    except ImportError as error:
        pytest.skip(f"NOT TESTED ON KUBERNETES: {error}")
    with kube_cluster() as kube:

        @contextlib.contextmanager
        def hold(_: Attempt) -> Iterator[None]:
            kube.fake_operator.pause()
            try:
                yield
            finally:
                kube.fake_operator.resume()

        yield Ground(kube.on, CLUSTER, hold, kube.server.kill, kube.server.back, {"token": kube.head.token})


GROUNDS = {"local": local, "address": address, "kuberay": kuberay}


@contextlib.contextmanager
def _without_room(on: str, attempt: Attempt) -> Iterator[None]:
    """The attempt's driver asks for more CPUs than there are, as on a head that has no room for it."""
    words = (
        "python -m graftwork.cluster.jobs.driver",
        attempt.job.root,
        attempt.job.job_id,
        str(attempt.number),
        "job",
    )
    with JobsApi(on) as jobs:
        name = RayJobsTarget(on, attempt.job.root).name(attempt.id)
        jobs.submit(" ".join(words), build_wheel()[1], name, entrypoint_num_cpus=1000)
    yield


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in values.items():
            patch.setenv(key, value)
        yield


class Relay:
    """A port of loopback that leads to another one until it is closed: connections are cut, new ones refused."""

    def __init__(self, target: int) -> None:
        self._target, self._port = target, free_port()
        self._server: socket.socket | None = None
        self._ends: list[socket.socket] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=[self._server], name="relay", daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
            self._server = None
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends = []

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
