"""`graftwork rebase --base NEW TASK@ALIAS...` and `graftwork train --curve`: several runs set side by side."""

from typing import TYPE_CHECKING, Annotated

import typer

from graftwork.cli.options import JsonFlag, Root, Target
from graftwork.cli.outcomes import difference
from graftwork.cli.output import echo, print_json, print_table, progress_bar
from graftwork.errors import ConfigError
from graftwork.storage import DEFAULT_ROOT

if TYPE_CHECKING:
    from graftwork.report.outcome_records import CurveReport, RebaseReport
    from graftwork.training.spec import TrainSpec


def rebase(
    aliases: Annotated[list[str], typer.Argument(metavar="TASK@ALIAS...", help="Published adapters to retrain.")],
    base: Annotated[str, typer.Option("--base", help="New base, in any form that `base:` of a spec accepts.")],
    root: Root = DEFAULT_ROOT,
    rows: Annotated[
        int, typer.Option("--rows", min=2, help="Held-out rows to evaluate, if the spec sets no number.")
    ] = 200,
    alpha: Annotated[float, typer.Option("--alpha", help="False discovery rate across the tasks.")] = 0.05,
    target: Target = "local",
    as_json: JsonFlag = False,
) -> None:
    """Retrain published adapters on a new base and test which tasks improve or regress. Moves no alias."""
    from graftwork.cluster.session import session
    from graftwork.training.outcomes.rebase import RebaseAsk, pairs_of, write_rebase
    from graftwork.training.outcomes.rebase import rebase as run_rebase

    ask = RebaseAsk(root, base, tuple(aliases), rows, alpha)
    pairs_of(ask)
    with progress_bar("rebase", as_json) as bar, session(target) as here:
        report = here.run(
            run_rebase, ask, on_progress=lambda alias, p: bar(p.step, p.total_steps, f"{alias}  loss {p.loss:.3f}")
        )
    page = write_rebase(ask, report)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_rebase(report)
    echo(f"report: {page.html_uri}")


def show_rebase(report: "RebaseReport") -> None:
    """Every task, old and new."""
    percent = f"{100 * (1 - report.alpha):g}%"
    print_table(
        f"{', '.join(report.old_bases)} -> {report.new_base} ({percent} intervals, BH over {len(report.tasks)} tasks)",
        ("task", "metric", "old", "new", "difference", "p", "n", "outcome"),
        [
            (task.alias, task.metric, f"{task.old.value:.3f}", f"{task.new.value:.3f}", difference(task.test),
             f"{task.p_adjusted:.2g}", task.test.n, task.outcome)
            for task in report.tasks
        ],
    )  # fmt: skip
    echo(report.sentence)
    for task in report.tasks:
        echo(f"  {task.promote}" + ("" if task.outcome == "gains" else f"  # {task.outcome}"))


def run_curve(spec: "TrainSpec", sizes: str, target: str, as_json: bool) -> None:
    """Train on each size, print and write what more examples bring."""
    from graftwork.cluster.session import session
    from graftwork.training.outcomes.curve import curve, curve_specs, write_curve

    asked = _sizes(sizes)
    curve_specs(spec, asked)
    many = spec.num_workers > 1
    with progress_bar(f"curve {spec.name}", as_json) as bar, session(target, needs_ray=many) as here:
        report = here.run(
            curve, spec, asked, on_progress=lambda p: bar(p.step, p.total_steps, f"loss {p.loss:.3f}")
        )  # fmt: skip
    page = write_curve(spec, report)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_curve(report)
    echo(f"report: {page.html_uri}")


def show_curve(report: "CurveReport") -> None:
    """A line a size, with what it brought against the size before."""
    from graftwork.report.words import interval, rounded

    steps = (None, *report.steps)
    print_table(
        f"{report.name}: {report.n} held-out questions, {100 * (1 - report.alpha):g}% intervals",
        ("examples", "held-out loss", report.metric, "loss against the size before", "p", ""),
        [
            (point.rows, f"{rounded(point.loss.value, 3)} {interval(point.loss.low, point.loss.high)}",
             f"{rounded(point.score.value, 3)} {interval(point.score.low, point.score.high)}",
             difference(step.loss) if step else "-", f"{step.p_adjusted:.2g}" if step else "-",
             "reused" if point.reused else "")
            for point, step in zip(report.points, steps, strict=True)
        ],
    )  # fmt: skip
    echo(report.sentence)


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--curve {text}", "it is not a list of whole numbers", "sizes stand with commas between",
                          "write --curve 50,100,200,400") from None  # fmt: skip
