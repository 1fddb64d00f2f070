"""`graftwork compare|quantize|rebase` and `graftwork train --curve`: several arms or runs compared, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftwork import config
from graftwork.cli.options import JsonFlag, LaunchOptions, Root, SpecFile, Target, with_options
from graftwork.cli.render import difference, echo, gib, print_json, print_table, progress_bar
from graftwork.cli.stages import run_stage
from graftwork.errors import ConfigError
from graftwork.storage.store import DEFAULT_ROOT

if TYPE_CHECKING:
    from graftwork.report.evaluation_schema import CurveReport, PrecisionArm, QuantizeReport, RebaseReport
    from graftwork.serving.evaluation.run import CompareOutcome
    from graftwork.serving.evaluation.spec import CompareSpec
    from graftwork.serving.quantize.run import QuantizeOutcome
    from graftwork.serving.quantize.spec import QuantizeSpec


_ACROSS = 5
"""Metrics that a line has room for; more stand below each other, the arms side by side."""


@with_options
def compare(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Evaluate all arms on held-out questions; print scores, significance tests and the verdict."""

    def run(spec: "CompareSpec", options: LaunchOptions) -> "CompareOutcome":
        from graftwork.base.support import check_serving
        from graftwork.cluster.session import session
        from graftwork.serving.evaluation.run import run_compare

        if options.target == "local":
            check_serving(spec)
        with progress_bar(f"compare {spec.name}", options.as_json) as bar, session(options.target) as here:
            return here.run(run_compare, spec, on_progress=lambda p: bar(p.done, p.total, f"{p.failed} failed"))

    def show(_: "CompareSpec", outcome: "CompareOutcome") -> None:
        show_comparison(outcome.report, outcome.reused)
        echo(f"report: {outcome.files.html_uri}")
        echo(f"each answer: {outcome.scores_uri}")

    run_stage("compare", file, options, run, show, lambda outcome: outcome.report.model_dump(mode="json"))


def show_comparison(report: Any, reused: int) -> None:
    """Print scores per arm, tests against the baseline, and the verdict in a sentence."""
    from graftwork.report.format import milliseconds, number, tied

    names = [metric.name for metric in report.metrics]
    title = f"{report.name}: {report.n} questions" + (f", {reused} answers reused" if reused else "")
    if len(names) <= _ACROSS:
        rows = [
            (arm.name, *[_interval(arm.scores.get(n)) for n in names], _cut(arm), arm.errors) for arm in report.arms
        ]
        print_table(title, ("arm", *names, "cut", "errors"), rows)
    else:
        down = [(name, *[_interval(arm.scores.get(name)) for arm in report.arms]) for name in names]
        down.append(("cut at max_new_tokens", *[_cut(arm) for arm in report.arms]))
        down.append(("errors", *[str(arm.errors) for arm in report.arms]))
        print_table(title, ("metric", *[arm.name for arm in report.arms]), down)
    if groups := [(a.metric, tied(a.groups)) for a in report.advice.metrics if tied(a.groups)]:
        print_table("not told apart (Holm over all pairs)", ("metric", "arms"), groups)
    print_table(
        f"against {report.baseline} (paired, Holm within a metric)",
        ("arm", "metric", "difference", "p", "verdict", "detectable"),
        [(d.a, d.metric, _interval(d), f"{d.p_adjusted:.2g}", d.verdict, number(d.mde)) for d in report.differences],
    )
    if report.slices:
        print_table(
            f"slices on {report.primary} against {report.baseline} (Benjamini-Hochberg: they explore)",
            ("slice", "n", "arm", "difference", "p", "verdict"),
            [
                (f"{s.field}={s.value}", s.n, d.a, _interval(d), f"{d.p_adjusted:.2g}", d.verdict)
                for s in report.slices
                for d in s.differences
            ],
        )
    if timed := [arm for arm in report.arms if arm.latency_ms]:
        print_table(
            "each arm alone, one request in flight (not tested)",
            ("arm", "first token p50", "answer p50", "slowest", "n"),
            [
                (
                    a.name,
                    milliseconds(a.ttft_ms.p50 if a.ttft_ms else None),
                    milliseconds(a.latency_ms.p50),
                    milliseconds(a.latency_ms.max),
                    a.latency_ms.n,
                )
                for a in timed
            ],
        )
    if report.judge:
        show_judge(report.judge)
    if report.card:
        show_card(report.card)
    echo(report.advice.sentence)
    for line in (*report.advice.caveats, *report.notes):
        echo(f"  {line}")


def show_judge(judge: Any) -> None:
    """Print the preferences of an LLM judge and their consistency."""
    from graftwork.report.format import percent, percents

    print_table(
        f"preferred by {judge.judge} over {judge.baseline}, in both orders",
        ("arm", "won", "lost", "tied", "strength"),
        [(a.arm, a.wins, a.losses, a.ties, f"{a.strength:+.2f} [{a.low:+.2f}, {a.high:+.2f}]") for a in judge.arms],
    )
    shares = (("says the same in both orders", judge.agreement), ("takes what stands first", judge.first))
    lines = [f"{text} in {percent(s.value)} {percents(s.low, s.high)}" for text, s in shares if s]
    echo(f"the judge {' and '.join(lines)} (n={judge.asked} judgements)" if lines else "the judge said no letter")


def show_card(card: Any) -> None:
    """Print the causes of the reference's failures, the arms that fix them, the cost of each arm, and the advice."""
    from graftwork.report import views
    from graftwork.report.format import NONE, count, gibibytes, milliseconds, percent, percents, seconds

    print_table(
        f"why {card.reference} fails: {card.probed} of {card.failures} failures probed",
        ("cause", "share of failures", "n", "it"),
        [
            (
                views.cause_name(c.cause),
                f"{percent(c.share.value)} {percents(c.share.low, c.share.high)}",
                c.share.count,
                {"dismissed": "does not matter", "open": "is undecided"}.get(c.state, c.state),
            )
            for c, _ in views.cause_tracks(card)
        ],
    )
    print_table(
        "of these failures, wholly right in another arm",
        ("arm", *map(views.cause_name, views.lifted(card))),
        [
            (arm, *[f"{percent(x.share.value)} {percents(x.share.low, x.share.high)}" for x in lifts])
            for arm, _, lifts in views.lift_rows(card)
        ],
    )
    print_table(
        "what each arm takes, and why it still fails",
        ("arm", "alone p50", "tokens", "training", "adapter", "failures by cause"),
        [
            (
                cost.arm,
                milliseconds(cost.latency_ms),
                count(cost.tokens),
                seconds(None if cost.training_min is None else 60 * cost.training_min),
                gibibytes(cost.adapter_gib),
                ", ".join(f"{views.cause_name(c)} {n}" for c, n in own.causes.items()) if own else NONE,
            )
            for cost, own in views.arm_rows(card)
        ],
    )
    for line in (card.sentence, *card.open):
        echo(line)


def _cut(arm: Any) -> str:
    """Share of an arm's answers that were cut."""
    from graftwork.report.format import percent

    return percent(arm.truncated / arm.n)


def _interval(score: Any) -> str:
    from graftwork.report.format import NONE, number

    if score is None:
        return NONE
    return f"{number(score.value)} [{number(score.low)}, {number(score.high)}]"


@with_options
def quantize(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Measure size, perplexity, score and speed of the base at each precision, and recommend one.

    Recommends the smallest precision that keeps the score within `margin` and the speed above `min_speed` of the spec.
    """

    def run(spec: "QuantizeSpec", options: LaunchOptions) -> "QuantizeOutcome":
        from graftwork.base.support import check_serving
        from graftwork.cluster.session import session
        from graftwork.serving.quantize.run import run_quantize

        if options.target == "local":
            check_serving(spec)
        with progress_bar(f"quantize {spec.name}", options.as_json) as bar, session(options.target) as here:
            return here.run(run_quantize, spec, on_progress=lambda p: bar(p.done, p.total, p.text))

    def show(_: "QuantizeSpec", outcome: "QuantizeOutcome") -> None:
        show_precisions(outcome.report, outcome.run_id, outcome.reused)
        echo(f"report: {outcome.files.html_uri}")

    run_stage("quantize", file, options, run, show, lambda outcome: outcome.report.model_dump(mode="json"))


def show_precisions(report: "QuantizeReport", run_id: str, reused: int) -> None:
    """Print a line for each precision and arm, the paired differences of the metric, and the recommendation."""
    reference = next(row for row in report.precisions if row.precision == report.reference)
    base_ppl = {arm.arm: arm.perplexity for arm in reference.arms}
    batches = list(reference.arms[0].tokens_per_s)
    print_table(
        f"{run_id}: {report.n} questions" + (f", {reused} precisions reused" if reused else ""),
        (
            "precision",
            "on disk",
            "resident",
            "peak RSS",
            "arm",
            "perplexity",
            f"x {report.reference}",
            report.metric,
            *[f"tok/s at {rows}" for rows in batches],
        ),
        [
            (
                row.precision,
                gib(row.stored_bytes),
                gib(row.resident_bytes),
                gib(row.peak_rss_bytes),
                arm.arm,
                f"{arm.perplexity:.3f}",
                f"{arm.perplexity / base_ppl[arm.arm]:.3f}",
                _score(arm, report.metric),
                *[f"{arm.tokens_per_s[rows].p50:.1f}" for rows in batches],
            )
            for row in report.precisions
            for arm in row.arms
        ],
    )
    print_table(
        f"against {report.reference} (paired, Holm within a metric)",
        ("precision/arm", "metric", "difference", "p", "verdict", "detectable"),
        [
            (
                d.a,
                d.metric,
                f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]",
                f"{d.p_adjusted:.2g}",
                d.verdict,
                f"{d.mde:.2f}",
            )
            for d in report.differences
            if d.metric == report.metric
        ],
    )
    echo(report.sentence)
    for note in report.notes:
        echo(f"  {note}")


def _score(arm: "PrecisionArm", metric: str) -> str:
    from graftwork.report.format import interval, score

    found = arm.scores[metric]
    return f"{score(found.value)} {interval(found.low, found.high)}"


def rebase(
    aliases: Annotated[list[str], typer.Argument(metavar="TASK@ALIAS...", help="Published adapters to retrain.")],
    base: Annotated[
        str, typer.Option("--base", metavar="URI", help="New base, in any form that `base:` of a spec accepts.")
    ],
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
    from graftwork.training.evaluation.rebase import RebaseAsk, pairs_of, write_rebase
    from graftwork.training.evaluation.rebase import rebase as run_rebase

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
    """Print the old and new score of every task."""
    percent = f"{100 * (1 - report.alpha):g}%"
    print_table(
        f"{', '.join(report.old_bases)} -> {report.new_base} ({percent} intervals, BH over {len(report.tasks)} tasks)",
        ("task", "metric", "old", "new", "difference", "p", "n", "outcome"),
        [
            (
                task.alias,
                task.metric,
                f"{task.old.value:.3f}",
                f"{task.new.value:.3f}",
                difference(task.test),
                f"{task.p_adjusted:.2g}",
                task.test.n,
                task.outcome,
            )
            for task in report.tasks
        ],
    )
    echo(report.sentence)
    for task in report.tasks:
        echo(f"  {task.promote}" + ("" if task.outcome == "gains" else f"  # {task.outcome}"))


def run_curve(file: Path, sizes: str, options: LaunchOptions) -> None:
    """Train once per number of rows; print and write the learning curve."""
    from graftwork.cluster.session import session
    from graftwork.training.evaluation.rebase import curve, curve_specs, write_curve
    from graftwork.training.spec import TrainSpec

    spec = config.load(file, options.sets, expect="train")
    assert isinstance(spec, TrainSpec)
    counts, quiet, many = _sizes(sizes), options.as_json, spec.num_workers > 1
    curve_specs(spec, counts)
    with progress_bar(f"curve {spec.name}", quiet) as bar, session(options.target, needs_ray=many) as here:
        report = here.run(curve, spec, counts, on_progress=lambda p: bar(p.step, p.total_steps, f"loss {p.loss:.3f}"))
    page = write_curve(spec, report)
    if quiet:
        print_json(report.model_dump(mode="json"))
        return
    show_curve(report)
    echo(f"report: {page.html_uri}")


def show_curve(report: "CurveReport") -> None:
    """Print a line for each number of rows, with its difference from the number before."""
    from graftwork.report.format import interval, rounded

    steps = (None, *report.steps)
    print_table(
        f"{report.name}: {report.n} held-out questions, {100 * (1 - report.alpha):g}% intervals",
        ("examples", "held-out loss", report.metric, "loss against the size before", "p", ""),
        [
            (
                point.rows,
                f"{rounded(point.loss.value, 3)} {interval(point.loss.low, point.loss.high)}",
                f"{rounded(point.score.value, 3)} {interval(point.score.low, point.score.high)}",
                difference(step.loss) if step else "-",
                f"{step.p_adjusted:.2g}" if step else "-",
                "reused" if point.reused else "",
            )
            for point, step in zip(report.points, steps, strict=True)
        ],
    )
    echo(report.sentence)


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--curve {text}",
            "it is not a list of whole numbers",
            "sizes stand with commas between",
            "write --curve 50,100,200,400",
        ) from None
