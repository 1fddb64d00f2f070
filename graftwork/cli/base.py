"""`graftwork base check BASE`: the stages that support a base model, each run on a scaled-down copy of it."""

from typing import Annotated

import typer

from graftwork.cli.options import JsonFlag
from graftwork.cli.render import echo, print_json, print_table

app = typer.Typer(help="Check base models.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Check base models."""


@app.command()
def check(
    base: Annotated[
        str,
        typer.Argument(metavar="BASE", help="Folder, config.json, or a Hugging Face id; the weights are not read."),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Report for each stage: supported, rejected (with the reason) or untested.

    The stages run on random weights of the base's structure: plan, each quantization, training, packing, serving.
    Exit code 2: transformers has no causal language model for the base.
    """
    from graftwork.base.load import read_config
    from graftwork.base.source import BaseSpec
    from graftwork.stages.base_check import check_base

    found = check_base(read_config(BaseSpec(uri=base)))
    if as_json:
        print_json({"base": base, **found.as_dict()})
        return
    rows = [(stage, one.status, one.reason) for stage, one in found.stages.items()]
    print_table(f"{base}: {found.model_type} ({found.model_class})", ("stage", "status", "reason"), rows)
    echo("stages ran on random weights of this structure, scaled down; `graftwork plan` uses the real sizes")
