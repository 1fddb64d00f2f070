"""`graftwork cluster start|join|stop`: a Ray of a few machines of one's own, closed to strangers."""

import time
from pathlib import Path
from typing import Annotated

import typer

from graftwork.cli.output import print_table, say
from graftwork.cluster import own_record, own_token
from graftwork.cluster.own import LOOPBACK, Node, NodeSpec, node
from graftwork.cluster.own_join import address_towards
from graftwork.cluster.own_ports import DASHBOARD_PORT, FIRST_PORT, GCS_PORT, Ports, listening, own_addresses
from graftwork.cluster.session import terminated_as_interrupt
from graftwork.errors import ClusterError, ConfigError

app = typer.Typer(help="A cluster of a few machines of your own, without Kubernetes.", no_args_is_help=True)
Host = Annotated[str, typer.Option(help="This machine's address that the others reach.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="The cluster's token, mode 0600; else ~/.config/graftwork/cluster-token."),
]
FirstPort = Annotated[int, typer.Option("--first-port", help="A node takes 210 ports from here on.")]
Cpus = Annotated[int | None, typer.Option(min=0, help="What jobs may take here; else all.")]
Gpus = Annotated[int | None, typer.Option(min=0, help="What jobs may take here; else all.")]
LOOK_S = 0.5


@app.command()
def start(
    host: Host = LOOPBACK,
    port: Annotated[int, typer.Option(help="Of the GCS, where workers join.")] = GCS_PORT,
    dashboard_port: Annotated[int, typer.Option(help="Of the dashboard, for --target.")] = DASHBOARD_PORT,
    first_port: FirstPort = FIRST_PORT,
    gcs_storage: Annotated[
        str | None, typer.Option(metavar="STORE", help="'rocksdb DIR' or redis://HOST:PORT: a killed head comes back.")
    ] = None,
    token_file: TokenFile = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    all_addresses: Annotated[bool, typer.Option("--all-addresses", help="The dashboard on 0.0.0.0.")] = False,
) -> None:
    """Be the head of a cluster until Ctrl-C."""
    file = token_file or own_token.default_file()
    if own_token.made(file):
        say(f"made a token: {file} (mode 0600). Copy it to each machine that joins or submits, e.g. with scp.")
    ports = Ports(first_port, port, dashboard_port)
    _serve(NodeSpec(host, ports, own_token.checked(file), cpus, gpus, gcs_storage, all_addresses))


@app.command()
def join(
    head: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of the head's GCS, as `start` printed it.")],
    host: Annotated[str | None, typer.Option(help="This machine's address; else the one towards the head.")] = None,
    first_port: FirstPort = FIRST_PORT,
    token_file: TokenFile = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
) -> None:
    """Be a worker of a cluster until Ctrl-C, or until its head is gone."""
    file = token_file or own_token.default_file()
    if not file.exists():
        raise ClusterError(f"join {head}", f"there is no token at {file}", "a cluster takes only who has its token",
                           "copy the head's token file here, with mode 0600, or name it by --token-file")  # fmt: skip
    _serve(NodeSpec(host or address_towards(head), Ports(first_port), own_token.checked(file), cpus, gpus, head=head))


@app.command()
def stop(
    address: Annotated[str | None, typer.Argument(metavar="[HOST:PORT]", help="Else the only cluster here.")] = None,
) -> None:
    """End this machine's nodes of a cluster."""
    found = [node for node in own_record.running() if address in (None, node.address)]
    clusters = sorted({node.address for node in found})
    if not found:
        raise ConfigError("cluster stop", f"no node{f' of {address}' if address else ''} runs on this machine",
                          "it ends what `cluster start` and `cluster join` started here, as this user")  # fmt: skip
    if len(clusters) > 1:
        raise ConfigError("cluster stop", f"nodes of several clusters run here: {', '.join(clusters)}",
                          "one cluster at a time", f"graftwork cluster stop {clusters[0]}")  # fmt: skip
    own_record.stop(found)
    say(f"ended {', '.join(f'{node.role} (pid {node.pid})' for node in found)} of {clusters[0]}")


def _serve(spec: NodeSpec) -> None:
    """Have the node run until it is told to end."""
    role = "worker" if spec.head else "head"
    with terminated_as_interrupt():
        try:
            with (
                node(spec) as here,
                terminated_as_interrupt(),
                own_record.recorded(role, here.address, spec.ports.first),
            ):
                _tell(spec, here)
                while (lost := here.lost()) is None:
                    time.sleep(LOOK_S)
        except KeyboardInterrupt:
            return say(f"the {role} has ended")
    raise ClusterError(
        f"the {role} of {here.address}", f"its {lost} has ended, so the node has too",
        "a worker goes when its head is gone" if spec.head else "a node is whole or gone",
        "start it again: jobs go on from their last checkpoint with `graftwork jobs resubmit`",
    )  # fmt: skip


def _tell(spec: NodeSpec, here: Node) -> None:
    """Its doors, as the kernel has them now, and what to type next."""
    names = {port: name for name, port in spec.ports.named().items() if not name.startswith("workers")}
    rows = [(port, names.get(port, "worker processes"), address) for address, port, _ in listening(here.pids)]
    workers = f"{spec.ports.workers[0]}-{spec.ports.workers[-1]}"
    print_table("listens", ("port", "what", "at"), [*dict.fromkeys(rows), (workers, "worker processes", "as raylet")])
    others = [address for address in own_addresses() if address not in (spec.host, LOOPBACK)]
    if spec.host != LOOPBACK and others:
        say(f"Ray's servers listen at all addresses of a machine, also at {', '.join(others)}: each asks for the "
            "token, a firewall there closes them")  # fmt: skip
    if not here.on:
        return say(f"a worker of {here.address}; Ctrl-C ends it")
    say(f"join    graftwork cluster join {here.address} --token-file FILE")
    say(f"submit  RAY_AUTH_TOKEN_PATH={spec.token_file} graftwork train FILE --target {here.on}")
    say("Ctrl-C ends it and all that runs on it")
