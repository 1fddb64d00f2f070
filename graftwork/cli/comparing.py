"""`graftwork compare FILE`, and how its finding is told in a terminal."""

from typing import Any

from graftwork import config
from graftwork.cli.launching import LaunchOptions, launch, resolve_here
from graftwork.cli.options import SpecFile, with_options
from graftwork.cli.output import echo, print_json, print_table, progress_bar

_ACROSS = 5
"""Metrics that a line has room for; more stand below each other, the arms side by side."""


@with_options
def compare(
    file: SpecFile,
    options: LaunchOptions,
) -> None:
    """Evaluate all arms on held-out questions; print scores, significance tests and the verdict."""
    from graftwork.serving.experiment.spec import CompareSpec

    spec = config.load(file, options.sets, expect="compare")
    assert isinstance(spec, CompareSpec)
    if options.elsewhere:
        return launch(spec, file, options)
    from graftwork.base_support import check_serving
    from graftwork.cluster.session import session
    from graftwork.serving.experiment.run import run_compare

    spec = resolve_here(spec, options.target, options.as_json)
    if options.target == "local":
        check_serving(spec)
    with progress_bar(f"compare {spec.name}", options.as_json) as bar, session(options.target) as here:
        outcome = here.run(run_compare, spec, on_progress=lambda p: bar(p.done, p.total, f"{p.failed} failed"))
    if options.as_json:
        print_json(outcome.report.model_dump(mode="json"))
    else:
        show_comparison(outcome.report, outcome.reused)
        echo(f"report: {outcome.files.html_uri}")
        echo(f"each answer: {outcome.scores_uri}")


def show_comparison(report: Any, reused: int) -> None:
    """Scores per arm, tests against the baseline, and the verdict in a sentence."""
    from graftwork.report import words

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
    if timed := [arm for arm in report.arms if arm.latency_ms]:
        print_table(
            "each arm alone, one request in flight (not tested)",
            ("arm", "first token p50", "answer p50", "slowest", "n"),
            [(a.name, words.milliseconds(a.ttft_ms.p50 if a.ttft_ms else None), words.milliseconds(a.latency_ms.p50),
              words.milliseconds(a.latency_ms.max), a.latency_ms.n) for a in timed],
        )  # fmt: skip
    if report.judge:
        show_judge(report.judge)
    if report.card:
        show_card(report.card)
    echo(report.advice.sentence)
    for line in (*report.advice.caveats, *report.notes):
        echo(f"  {line}")


def show_judge(judge: Any) -> None:
    """What an LLM prefers, and how far it can be believed."""
    from graftwork.report import words

    print_table(
        f"preferred by {judge.judge} over {judge.baseline}, in both orders",
        ("arm", "won", "lost", "tied", "strength"),
        [(a.arm, a.wins, a.losses, a.ties, f"{a.strength:+.2f} [{a.low:+.2f}, {a.high:+.2f}]") for a in judge.arms],
    )
    told = (("says the same in both orders", judge.agreement), ("takes what stands first", judge.first))
    said = [f"{text} in {words.percent(s.value)} {words.percents(s.low, s.high)}" for text, s in told if s]
    echo(f"the judge {' and '.join(said)} (n={judge.asked} judgements)" if said else "the judge said no letter")


def show_card(card: Any) -> None:
    """Why the reference fails, what mends it, what each arm takes, and what to do."""
    from graftwork.report import figures, words

    print_table(
        f"why {card.reference} fails: {card.probed} of {card.failures} failures probed",
        ("cause", "share of failures", "n", "it"),
        [(figures.cause_name(c.cause), f"{words.percent(c.share.value)} {words.percents(c.share.low, c.share.high)}",
          c.share.count, {"dismissed": "does not matter", "open": "is undecided"}.get(c.state, c.state))
         for c, _ in figures.cause_tracks(card)],
    )  # fmt: skip
    print_table(
        "of these failures, wholly right in another arm",
        ("arm", *map(figures.cause_name, figures.lifted(card))),
        [(arm, *[f"{words.percent(x.share.value)} {words.percents(x.share.low, x.share.high)}" for x in lifts])
         for arm, _, lifts in figures.lift_rows(card)],
    )  # fmt: skip
    print_table(
        "what each arm takes, and why it still fails",
        ("arm", "alone p50", "tokens", "training", "adapter", "failures by cause"),
        [(cost.arm, words.milliseconds(cost.latency_ms), words.count(cost.tokens),
          words.seconds(None if cost.training_min is None else 60 * cost.training_min),
          words.gibibytes(cost.adapter_gib),
          ", ".join(f"{figures.cause_name(c)} {n}" for c, n in own.causes.items()) if own else words.NONE)
         for cost, own in figures.arm_rows(card)],
    )  # fmt: skip
    for line in (card.sentence, *card.open):
        echo(line)


def _cut(arm: Any) -> str:
    """Share of an arm's answers that were cut."""
    from graftwork.report import words

    return words.percent(arm.truncated / arm.n)


def _interval(score: Any) -> str:
    from graftwork.report import words

    if score is None:
        return words.NONE
    return f"{words.number(score.value)} [{words.number(score.low)}, {words.number(score.high)}]"
