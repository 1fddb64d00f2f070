"""`graftwork jobs export`: the jobs of a store for Prometheus."""

from typing import Annotated

import typer

from graftwork.cli.output import say
from graftwork.errors import ClusterError
from graftwork.storage import DEFAULT_ROOT


def export(
    root: Annotated[str, typer.Option("--root", envvar="GRAFTWORK_ROOT", help="Store of the jobs.")] = DEFAULT_ROOT,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 9464,
) -> None:
    """Answer GET /metrics with the state of every job of a store, until Ctrl-C."""
    from graftwork.cluster.exporter import export as answer

    say(f"jobs of {root} at http://{host}:{port}/metrics  (Ctrl-C ends it)")
    try:
        answer(root, host, port)
    except OSError as error:
        raise ClusterError(
            f"--host {host} --port {port}", f"cannot listen there ({error.strerror})", "one process a port",
            "choose another --port",
        ) from None  # fmt: skip
