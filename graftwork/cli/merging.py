"""`graftwork adapters merge`: published adapters of one base into a new one, offline."""

from typing import Annotated

import typer

from graftwork.cli.options import Alias, JsonFlag, Root
from graftwork.cli.output import echo, print_json
from graftwork.errors import ConfigError
from graftwork.storage import DEFAULT_ROOT, Store


def merge(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Task to publish the merged adapter under.")],
    refs: Annotated[list[str], typer.Argument(metavar="TASK@REF...", help="Two or more adapters of the same base.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="cat (the exact sum), svd (its nearest of a lower rank), linear, ties, "
            "dare_linear, dare_ties, magnitude_prune; the last four also with _svd.",
        ),
    ] = "cat",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W...", help="One weight per adapter. Default: equal weights that sum to 1."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Fraction of entries that ties, dare and magnitude_prune keep.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Rank of the result, for the svd methods. Default: the largest input rank."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed for the entries that dare drops.")] = 0,
    alias: Alias = "latest",
    root: Root = DEFAULT_ROOT,
    as_json: JsonFlag = False,
) -> None:
    """Merge LoRA adapters into one and publish it. The manifest lists the merged versions."""
    from graftwork.training.adapters.merge_spec import MergeSpec
    from graftwork.training.merging import merge_published

    spec = MergeSpec.create(method, len(refs), _numbers(weights), density, rank, seed)
    done = merge_published(Store(root), out, refs, spec, alias=alias)
    if as_json:
        return print_json({**done.manifest.model_dump(mode="json"), "notes": done.notes})
    parts = " + ".join(f"{weight:g} {ref}" for weight, ref in zip(spec.weights, done.manifest.merged_from, strict=True))
    echo(f"{done.manifest.ref} = {parts}")
    echo(f"  by {spec.method}, rank {done.rank}; {done.distance:.2%} away from the sum of the weighted deltas")
    for note in done.notes:
        echo(f"  {note}")


def _numbers(text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--weights {text}", "it is no list of numbers", "write --weights 0.7,0.3") from None
