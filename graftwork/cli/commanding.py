"""`graftwork command FILE`: a program of the user's, here or as a job."""

import subprocess

import typer

from graftwork import config
from graftwork.cli.launching import Budget, Deadline, Launch, Pending, launch
from graftwork.cli.output import Cluster, Detach, JsonFlag, On, Sets, SpecFile
from graftwork.errors import ConfigError


def command(
    file: SpecFile,
    on: On = "local",
    sets: Sets = [],  # noqa: B006
    detach: Detach = False,
    cluster: Cluster = None,
    deadline: Deadline = None,
    budget: Budget = None,
    pending: Pending = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a program of one's own (kind: command) where the work is; on local without --detach, here and now."""
    from graftwork.cluster.command_spec import CommandSpec

    spec = config.load(file, sets, expect="command")
    assert isinstance(spec, CommandSpec)
    how = Launch(on, detach, cluster, deadline, budget, pending)
    if how.elsewhere:
        return launch(spec, file, how, as_json)
    if on != "local":
        raise ConfigError(f"--on {on}", "a program is no stage that could run through Ray Client",
                          "local, http(s)://HOST:PORT of a Ray's dashboard, or k8s:CONTEXT/NAMESPACE")  # fmt: skip
    try:
        code = subprocess.run(spec.argv, check=False).returncode
    except OSError as error:
        raise ConfigError(f"argv: {spec.argv[0]}", f"it cannot be started ({error.strerror})",
                          "the first word is a program of this machine") from None  # fmt: skip
    if code:
        raise typer.Exit(code if code > 0 else 1)
