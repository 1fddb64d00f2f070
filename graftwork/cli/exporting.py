"""`graftwork jobs export`: the jobs of a store for Prometheus."""

from typing import Annotated

import typer

from graftwork.cli.output import echo
from graftwork.errors import ClusterError
from graftwork.storage import DEFAULT_ROOT


def export(
    root: Annotated[
        str, typer.Option("--root", envvar="GRAFTWORK_ROOT", help="Object store of the jobs.")
    ] = DEFAULT_ROOT,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 9464,
) -> None:
    """Serve Prometheus metrics of all jobs of an object store at /metrics, until Ctrl-C."""
    from graftwork.cluster.exporter import export as answer

    echo(f"jobs of {root} at http://{host}:{port}/metrics  (Ctrl-C ends it)")
    try:
        answer(root, host, port)
    except OSError as error:
        raise ClusterError(
            f"--host {host} --port {port}", f"cannot listen there ({error.strerror})", "one process a port",
            "choose another --port",
        ) from None  # fmt: skip
