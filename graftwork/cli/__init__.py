"""Command line: parsing, printing and exit codes. The modules that it calls own the logic.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 3 no cluster could be had.
"""

import itertools
import sys
import traceback
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from graftwork import __version__
from graftwork.cli import adapters, base, compare, data, experiment, jobs, plan, rag, stages, tune
from graftwork.cli import config as configs
from graftwork.cli.options import RENAMED_FLAGS, RENAMED_VERBS
from graftwork.cli.render import print_error
from graftwork.errors import ConfigError, GraftworkError, Interrupted


class _Commands(TyperGroup):
    """Command group that rejects a renamed verb or flag with its new name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # typer has no public name for the type of `ctx`
        if args and args[0] in RENAMED_VERBS:
            raise _renamed_error(f"graftwork {args[0]}", f"graftwork {RENAMED_VERBS[args[0]]}", "no such command")
        for flag in (word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", args)):
            if flag in RENAMED_FLAGS:
                raise _renamed_error(flag, RENAMED_FLAGS[flag], "no such option")
        return super().parse_args(ctx, args)


def _renamed_error(old: str, new: str, problem: str) -> ConfigError:
    return ConfigError(old, problem, f"{old} was renamed to {new}", f"use {new}")


app = typer.Typer(
    name="graftwork",
    cls=_Commands,
    help="Finetune, tune, serve and compare many task adapters on one quantized base model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"graftwork {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for verb in (plan.plan, tune.tune, stages.train, stages.serve, compare.compare, compare.quantize, stages.chat):
    app.command()(verb)
for verb in (stages.demo, compare.rebase):
    app.command()(verb)
app.command("exec")(stages.exec_program)
app.command(hidden=True)(stages.trial)
app.command()(jobs.doctor)
app.command()(adapters.swap)
app.add_typer(adapters.app, name="adapters")
app.add_typer(base.app, name="base")
app.add_typer(configs.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(experiment.app, name="experiment")
app.add_typer(jobs.app, name="jobs")
app.add_typer(configs.k8s_app, name="k8s")
app.add_typer(rag.app, name="rag")


def main() -> None:
    """Run the command line `graftwork`."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command line; every error leaves as a message and an exit code, never as a bare traceback."""
    as_json = "--json" in sys.argv
    try:
        app(standalone_mode=True)
    except GraftworkError as error:
        print_error(error, as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stop = Interrupted(
            "stopped by Ctrl-C", "", "what was committed stays valid", "run the same command to continue"
        )
        print_error(stop, as_json)
        sys.exit(stop.exit_code)
    except Exception as error:  # the top of the process: our own bug
        trace = Path(gettempdir()) / "graftwork-traceback.txt"
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        wrapped = GraftworkError(
            "internal error",
            f"{type(error).__name__}: {error}",
            "this is a bug in graftwork, not in your input",
            f"report it with the traceback in {trace}",
        )
        print_error(wrapped, as_json)
        sys.exit(1)
