"""`graftwork quantize FILE`: what each precision of the base costs and keeps, and which one to serve."""

from typing import TYPE_CHECKING

from graftwork import config
from graftwork.cli.launching import LaunchOptions, launch, resolve_here
from graftwork.cli.options import SpecFile, with_options
from graftwork.cli.output import echo, gib, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from graftwork.report.quantize_records import PrecisionArm, QuantizeReport


@with_options
def quantize(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Measure size, perplexity, score and speed of the base at each precision, and recommend one.

    Recommends the smallest precision that keeps the score within `margin` and the speed above `min_speed` of the spec.
    """
    from graftwork.serving.quantize.spec import QuantizeSpec

    spec = config.load(file, options.sets, expect="quantize")
    assert isinstance(spec, QuantizeSpec)
    if options.elsewhere:
        return launch(spec, file, options)
    from graftwork.base_support import check_serving
    from graftwork.cluster.session import session
    from graftwork.serving.quantize.run import run_quantize

    spec = resolve_here(spec, options.target, options.as_json)
    if options.target == "local":
        check_serving(spec)
    with progress_bar(f"quantize {spec.name}", options.as_json) as bar, session(options.target) as here:
        outcome = here.run(run_quantize, spec, on_progress=lambda p: bar(p.done, p.total, p.text))
    if options.as_json:
        print_json(outcome.report.model_dump(mode="json"))
        return
    show_precisions(outcome.report, outcome.run_id, outcome.reused)
    echo(f"report: {outcome.files.html_uri}")


def show_precisions(report: "QuantizeReport", run_id: str, reused: int) -> None:
    """A line for each precision and arm, the paired differences of the metric, and the recommendation."""
    reference = next(row for row in report.precisions if row.precision == report.reference)
    base_ppl = {arm.arm: arm.perplexity for arm in reference.arms}
    batches = list(reference.arms[0].tokens_per_s)
    print_table(
        f"{run_id}: {report.n} questions" + (f", {reused} precisions reused" if reused else ""),
        ("precision", "on disk", "resident", "peak RSS", "arm", "perplexity", f"x {report.reference}", report.metric,
         *[f"tok/s at {rows}" for rows in batches]),
        [(row.precision, gib(row.stored_bytes), gib(row.resident_bytes), gib(row.peak_rss_bytes), arm.arm,
          f"{arm.perplexity:.3f}", f"{arm.perplexity / base_ppl[arm.arm]:.3f}", _score(arm, report.metric),
          *[f"{arm.tokens_per_s[rows].p50:.1f}" for rows in batches])
         for row in report.precisions for arm in row.arms],
    )  # fmt: skip
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
    score = arm.scores[metric]
    from graftwork.report import words

    return f"{words.score(score.value)} {words.interval(score.low, score.high)}"
