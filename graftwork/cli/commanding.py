"""`graftwork exec FILE`: run a program of the user, here or as a job."""

import subprocess

import typer

from graftwork import config
from graftwork.cli.launching import LaunchOptions, launch
from graftwork.cli.options import SpecFile, with_options
from graftwork.errors import ConfigError


@with_options
def exec_program(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Run a program of your own (kind: exec), here or as a job."""
    from graftwork.cluster.command_spec import ExecSpec

    spec = config.load(file, options.sets, expect="exec")
    assert isinstance(spec, ExecSpec)
    if options.elsewhere:
        return launch(spec, file, options)
    if options.target != "local":
        raise ConfigError(f"--target {options.target}", "a program is no stage that could run through Ray Client",
                          "local, http(s)://HOST:PORT of a Ray's dashboard, or k8s:CONTEXT/NAMESPACE")  # fmt: skip
    try:
        code = subprocess.run(spec.argv, check=False).returncode
    except OSError as error:
        raise ConfigError(f"argv: {spec.argv[0]}", f"it cannot be started ({error.strerror})",
                          "the first word is a program of this machine") from None  # fmt: skip
    if code:
        raise typer.Exit(code if code > 0 else 1)
