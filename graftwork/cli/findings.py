"""Findings of preflight and doctor as a list for people: the code, where, what is wrong and the hint."""

from collections.abc import Sequence

from graftwork.cli.output import console, echo
from graftwork.cluster.backend import Finding


def show_findings(findings: Sequence[Finding], nothing: str = "no findings") -> None:
    """Errors first; a line what is wrong, a line the rule, a line the hint."""
    if not findings:
        return echo(f"  {nothing}")
    for finding in sorted(findings, key=lambda one: one.level != "error"):
        style = "red" if finding.level == "error" else "yellow"
        console.print(f"  {finding.code}", style=style, markup=False, end="")
        console.print(f"  {finding.where}: {finding.problem}", markup=False, soft_wrap=True)
        if finding.rule:
            echo(f"      rule: {finding.rule}")
        if finding.hint:
            echo(f"      hint: {finding.hint}")
