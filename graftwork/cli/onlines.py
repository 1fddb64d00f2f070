"""How an online experiment's report is told in a terminal."""

from typing import TYPE_CHECKING

from graftwork.cli.output import echo, print_table

if TYPE_CHECKING:
    from graftwork.report.online_records import ExperimentReport


def show_online(report: "ExperimentReport") -> None:
    """Differences with sequences, guardrails, and the verdict in a sentence."""
    from graftwork.report import online, words

    unit = "prompts" if report.mode == "shadow" else "units"
    print_table(
        f"{report.name}: {report.metric}, {report.mode}, {words.count(report.rows)} rows",
        ("arm", unit, "plain mean", "answers", "failed"),
        [(arm.name, arm.units, words.NONE if arm.mean is None else f"{arm.mean:.3f}", arm.answers, arm.errors)
         for arm in report.arms],
    )  # fmt: skip
    print_table(
        f"against {report.control} (holds at every look)",
        ("arm", online.estimator(report.mode), unit, "e-value", "verdict", "would decide"),
        [(one.arm, f"{online.signed(one.estimate)} {online.effect_interval(one)}", one.n, online.evidence(one.e_value),
          one.verdict, words.NONE if one.n_needed is None else words.count(one.n_needed)) for one in report.contrasts],
    )  # fmt: skip
    if report.guardrails:
        rows = [(g.arm, g.says, words.NONE if g.value is None else f"{g.value:.3f}", g.n, online.guard_state(g))
                for g in report.guardrails]  # fmt: skip
        print_table("guardrails", ("arm", "bound", "seen", "n", "state"), rows)
    for note in report.notes:
        echo(f"  {note}")
    echo(report.sentence)
