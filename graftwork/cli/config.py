"""`graftwork config check|show|schema`: what a spec says, without starting anything."""

from pathlib import Path
from typing import Annotated

import typer
import yaml

from graftwork import config
from graftwork.base.support import check_local
from graftwork.cli.options import JsonFlag, Sets
from graftwork.cli.render import echo, print_json, print_table
from graftwork.errors import ConfigError

app = typer.Typer(help="Validate, resolve and describe spec files.", no_args_is_help=True)
SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML spec; its `kind` names the stage.")]


@app.command()
def check(file: SpecFile, sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006 (typer copies it)
    """Validate a spec. Exits with 2 and lists each wrong key with its value, the rule and the nearest known key.

    Where the base is a folder of this machine, also check that it supports the stage.
    """
    spec = config.load(file, sets)
    check_local(spec)
    kind = spec.model_dump()["kind"]
    if as_json:
        print_json({"file": str(file), "kind": kind, "digest": spec.digest(), "ok": True})
    else:
        echo(f"ok: {file} is a valid {kind} spec (digest {spec.digest()[:8]})")


@app.command()
def show(file: SpecFile, sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Print the resolved spec: each key with its value and its source (file or default)."""
    spec = config.load(file, sets)
    tree = config.read_yaml(file.read_text(encoding="utf-8"))
    given = {**tree, **{item.partition("=")[0]: True for item in sets}}
    rows = [(key, value, came) for key, value, came in config.explain(spec, given)]
    if as_json:
        print_json({key: {"value": value, "from": came} for key, value, came in rows})
    else:
        print_table(f"{file} (digest {spec.digest()[:8]})", ("key", "value", "from"), rows)


@app.command()
def schema(kind: Annotated[str, typer.Argument(metavar="KIND|FILE", help="Kind of a spec, or a spec file.")]) -> None:
    """Print the JSON schema of a spec, for editors."""
    if kind not in config.SPEC_KINDS and Path(kind).suffix in (".yaml", ".yml"):
        tree = yaml.safe_load(Path(kind).read_text(encoding="utf-8")) if Path(kind).is_file() else None
        if not isinstance(tree, dict):
            raise ConfigError(
                f"spec file {kind}", "it does not exist or is no mapping", "schema takes a stage or a spec file"
            )
        kind = str(tree.get("kind"))
    print_json(config.schema(kind))
