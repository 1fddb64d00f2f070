"""Tries every door of a host from another one, without a token: which ports listen, and what they give a stranger.

python -m tests.hosts.port_scan ports IP          listening ports, as JSON
python -m tests.hosts.port_scan http IP PORT      {"METHOD path": status} of all routes that answer with less than 400
python -m tests.hosts.port_scan grpc IP PORT      status of an empty call of each method of Ray's
python -m tests.hosts.port_scan gcs IP PORT       what the GCS says to this environment's token
"""

import http.client
import importlib
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
METHODS = ("GET", "POST", "PUT", "DELETE")
UNSEEN = (
    "ray.rpc.ObjectManagerService/Push",
    "ray.rpc.ObjectManagerService/Pull",
    "opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
)
"""Services that Ray's servers have and its Python does not."""


def ports(ip: str) -> list[int]:
    """All TCP ports that accept a connection."""
    found = []
    for port in range(1, 65536):
        with socket.socket() as probe:
            probe.settimeout(TIMEOUT_S)
            if probe.connect_ex((ip, port)) == 0:
                found.append(port)
    return found


def routes() -> list[str]:
    """Every path that Ray's dashboard and agents serve, read from their sources, with a word for each variable."""
    import ray

    sources = Path(ray.__file__).parent
    files = [*sources.glob("dashboard/**/*.py"), sources / "_private/runtime_env/agent/main.py"]
    paths = {"/metrics", "/static/", "/-/healthz", "/api/serve/applications/"}
    for file in files:
        text = file.read_text(encoding="utf-8")
        paths |= set(
            re.findall(r"(?:outes\.(?:get|post|put|delete|view|head)|add_post|add_get)\(\s*\"(/[^\"]*)\"", text)
        )
    return sorted(re.sub(r"{[^}]*}", "x", path) for path in paths)


def answers(ip: str, port: int) -> dict[str, int]:
    """Status of all routes and methods that answer a stranger with less than 400."""
    found = {}
    for path in routes():
        for method in METHODS:
            status = _status(ip, port, method, path)
            if status is not None and status < 400:
                found[f"{method} {path}"] = status
    return found


def _status(ip: str, port: int, method: str, path: str) -> int | None:
    connection = http.client.HTTPConnection(ip, port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body="{}" if method in ("POST", "PUT") else None)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def methods() -> list[str]:
    """Every gRPC method that Ray's generated code knows, as SERVICE/METHOD."""
    import ray

    files = (Path(ray.__file__).parent / "core/generated").glob("**/*_pb2_grpc.py")
    found = {name for file in files for name in re.findall(r"'/([\w.]+/\w+)'", file.read_text(encoding="utf-8"))}
    return sorted({*found, *UNSEEN})


def calls(ip: str, port: int) -> Iterator[tuple[str, str]]:
    """What a gRPC server says to an empty message without a token; nothing where none is."""
    grpc: Any = importlib.import_module("grpc")  # has no types

    with grpc.insecure_channel(f"{ip}:{port}") as channel:
        for method in methods():
            call: Any = channel.unary_unary(f"/{method}", lambda data: data, lambda data: data)
            try:
                call(b"", timeout=TIMEOUT_S / 2)
                yield method, "OK"
            except grpc.RpcError as error:
                yield method, error.code().name


def gcs(ip: str, port: int) -> str:
    """`welcome`, or the name of Ray's error."""
    from ray.exceptions import RayError

    raylet: Any = importlib.import_module("ray._raylet")
    try:
        raylet.GcsClient(address=f"{ip}:{port}").internal_kv_get(b"session_name", b"session", timeout=TIMEOUT_S)
    except RayError as error:
        return type(error).__name__
    return "welcome"


def _main() -> None:
    what, ip, *rest = sys.argv[1:]
    if what == "ports":
        print(json.dumps(ports(ip)))
    elif what == "http":
        print(json.dumps(answers(ip, int(rest[0]))))
    elif what == "grpc":
        print(json.dumps(dict(calls(ip, int(rest[0])))))
    else:
        print(json.dumps(gcs(ip, int(rest[0]))))


if __name__ == "__main__":
    _main()
