"""`graftwork compare FILE`, and how its finding is told in a terminal."""

from typing import Any

from graftwork import config
from graftwork.cli.output import JsonFlag, On, Sets, SpecFile, print_json, print_table, progress_bar, say


def compare(file: SpecFile, on: On = "local", sets: Sets = [], as_json: JsonFlag = False) -> None:  # noqa: B006
    """Let all arms answer the held-out questions; print scores, tests and the verdict."""
    from graftwork.serving.experiment.spec import CompareSpec

    spec = config.load(file, sets, expect="compare")
    assert isinstance(spec, CompareSpec)
    from graftwork.cluster.session import session
    from graftwork.serving.experiment.run import run_compare

    with progress_bar(f"compare {spec.name}", as_json) as bar, session(on) as here:
        outcome = here.run(run_compare, spec, on_progress=lambda p: bar(p.done, p.total, f"{p.failed} failed"))
    if as_json:
        print_json(outcome.report.model_dump(mode="json"))
    else:
        show_comparison(outcome.report, outcome.reused)


def show_comparison(report: Any, reused: int) -> None:
    """Scores per arm, tests against the baseline, and the verdict in a sentence."""
    from graftwork.report import words

    names = [metric.name for metric in report.metrics]
    print_table(
        f"{report.name}: {report.n} questions" + (f", {reused} answers reused" if reused else ""),
        ("arm", *names, "errors"),
        [(arm.name, *[_interval(arm.scores.get(n)) for n in names], arm.errors) for arm in report.arms],
    )
    if tied := [(a.metric, words.tied(a.groups)) for a in report.advice.metrics if words.tied(a.groups)]:
        print_table("not told apart (Holm over all pairs)", ("metric", "arms"), tied)
    print_table(
        f"against {report.baseline} (paired, Holm within a metric)",
        ("arm", "metric", "difference", "p", "verdict", "detectable"),
        [
            (d.a, d.metric, _interval(d), f"{d.p_adjusted:.2g}", d.verdict, words.number(d.mde))
            for d in report.differences
        ],
    )
    if report.slices:
        print_table(
            f"slices on {report.primary} against {report.baseline} (Benjamini-Hochberg: they explore)",
            ("slice", "n", "arm", "difference", "p", "verdict"),
            [(f"{s.field}={s.value}", s.n, d.a, _interval(d), f"{d.p_adjusted:.2g}", d.verdict)
             for s in report.slices for d in s.differences],
        )  # fmt: skip
    say(report.advice.sentence)


def _interval(score: Any) -> str:
    from graftwork.report import words

    if score is None:
        return words.NONE
    return f"{words.number(score.value)} [{words.number(score.low)}, {words.number(score.high)}]"
