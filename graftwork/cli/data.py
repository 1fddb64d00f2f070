"""`graftwork data show FILE`: a dataset as training reads it, with the tokens that are learned."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from graftwork import config
from graftwork.cli.options import JsonFlag, Sets
from graftwork.cli.render import console, echo, print_json, print_table
from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from graftwork.training.dataset_report import DatasetReport, SequenceLengths, ShownRow
    from graftwork.training.spec import TrainSpec

app = typer.Typer(help="Inspect datasets.", no_args_is_help=True)
_BAR = 40
_LISTED = 20
"""Keys that are listed; the JSON has all."""


@app.callback()
def data() -> None:
    """Inspect datasets."""


@app.command()
def show(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="Rows: a file, folder, s3://, hf://. Default: data.train of --spec."),
    ] = None,
    spec_file: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="Training spec that reads the rows.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="Base whose tokenizer and chat template are used.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=0, metavar="N", help="Rows to show with their tokens.")] = 3,
    sets: Sets = [],  # noqa: B006
    as_json: JsonFlag = False,
) -> None:
    """Print format, keys, token lengths, duplicates and the first rows with the learned tokens marked.

    The rows are read as a training run reads them: by the objective of --spec, else by the default objective of the
    file's format. On a terminal learned tokens are green; elsewhere they are in [[ ]].
    """
    from graftwork.training.dataset_report import report_on, report_without_base

    spec = _spec(file, spec_file, base, sets)
    if spec is None:
        assert file is not None, "checked with the options"
        report = report_without_base(file)
    else:
        report = report_on(spec, "eval" if _names_eval_rows(file, spec) else "train", rows)
    if as_json:
        print_json(asdict(report))
    else:
        _print(report)


def _spec(file: str | None, spec_file: Path | None, base: str | None, sets: list[str]) -> "TrainSpec | None":
    """The spec that reads the rows; None where no tokens can be shown for want of a base."""
    from graftwork.training.dataset_report import spec_of_file
    from graftwork.training.spec import TrainSpec

    if spec_file is None:
        if file is None:
            raise ConfigError("data show", "neither FILE nor --spec is given", "name the rows", "add a FILE")
        if sets and base is None:
            raise ConfigError(f"--set {sets[0]}", "no base is given", "--set changes a spec", "add --base or --spec")
        return spec_of_file(file, base, sets) if base is not None else None
    spec = config.load(spec_file, sets, expect="train")
    assert isinstance(spec, TrainSpec)
    changes = {"base": base} if base is not None else {}
    if file is not None and not _names_eval_rows(file, spec):
        changes["data.train"] = file
    return spec.with_(changes) if changes else spec


def _names_eval_rows(file: str | None, spec: "TrainSpec") -> bool:
    from graftwork.datasets.rows import is_same_place

    return file is not None and isinstance(spec.data.eval, str) and is_same_place(file, spec.data.eval)


def _print(report: "DatasetReport") -> None:
    echo(
        f"{report.source}: {report.count} rows in the format {report.format}, read by objective.kind={report.objective}"
    )
    for path, name in report.files.items() if len(report.files) > 1 else ():
        echo(f"  {path}: {name}")
    rows = "1 row repeats" if report.duplicates == 1 else f"{report.duplicates} rows repeat"
    repeated = f"{rows} the content of another" if report.duplicates else "no row twice"
    echo(f"duplicates: {repeated}")
    if report.eval is not None:
        echo(f"held-out rows: {report.eval['rows']}, {report.eval['overlap']} of them also among the training rows")
    for line in report.notes:
        echo(f"note: {line}")
    keys = [*((key, "used", n) for key, n in report.used.items())]
    keys += [(key, "ignored", n) for key, n in report.ignored.items()]
    print_table("keys", ("key", "", "rows"), keys[:_LISTED])
    if len(keys) > _LISTED:
        echo(f"  and {len(keys) - _LISTED} more; --json has all")
    if report.tokens is not None:
        _print_lengths(report.tokens)
    for row in report.rows:
        _print_row(row)


def _print_lengths(tokens: "SequenceLengths") -> None:
    share = tokens.trained / tokens.total if tokens.total else 0.0
    echo(f"{tokens.sequences} sequences of {tokens.total} tokens, {tokens.trained} ({share:.1%}) of them learned")
    quantiles = ", ".join(f"{name} {value}" for name, value in tokens.quantiles.items())
    echo(f"tokens of a sequence: {quantiles}")
    if tokens.too_long:
        echo(f"{tokens.too_long} rows are longer than max_length={tokens.max_length} and are left out")
    most = max(tokens.histogram.values())
    bars = [(f"<= {end}", n, "#" * -(-n * _BAR // most)) for end, n in tokens.histogram.items()]
    print_table("sequences by length", ("tokens", "sequences", ""), bars)


def _print_row(row: "ShownRow") -> None:
    echo(f"--- row {row.id}{f' ({row.side})' if row.side else ''}: {len(row.tokens)} tokens")
    parts = list(_runs((token.text, token.trained) for token in row.tokens))
    if console.is_terminal:
        console.print(Text.assemble(*((text, "bold green" if on else "dim") for text, on in parts)), soft_wrap=True)
    else:
        echo("".join(f"[[{text}]]" if on else text for text, on in parts))


def _runs(tokens: Iterable[tuple[str, bool]]) -> Iterable[tuple[str, bool]]:
    """Texts of neighbouring tokens with the same mask, joined; control characters are escaped for the terminal."""
    text, last = "", None
    for part, trained in tokens:
        if trained is not last and last is not None:
            yield text, last
            text = ""
        text, last = text + _printable(part), trained
    if last is not None:
        yield text, last


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
