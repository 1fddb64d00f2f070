"""Command line of the studies: `python -m examples.studies FILE`, from the root of the repository."""

import typer

from examples.studies.cli import study
from graftwork.cli import run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(study)

if __name__ == "__main__":
    run(app)
