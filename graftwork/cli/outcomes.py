"""What a run gained and lost, as a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftwork.cli.output import echo, print_table

if TYPE_CHECKING:
    from graftwork.report.outcome_records import Change, PairedTest


def show_outcomes(found: Mapping[str, Any]) -> None:
    """Every metric before and after, and of which changes one can be sure."""
    from graftwork.report.outcome_records import OutcomesReport
    from graftwork.report.outcomes import WORDS
    from graftwork.report.words import rounded

    report = OutcomesReport.model_validate(found)
    print_table(
        f"gained and lost (paired, {100 * (1 - report.alpha):g}% intervals, Holm over {report.family})",
        ("part", "metric", "before", "after", "difference", "p", "questions", "clusters", ""),
        [
            (_part(change), change.metric, rounded(change.before.value, 3), rounded(change.after.value, 3),
             difference(change.test), "-" if change.p_adjusted is None else f"{change.p_adjusted:.2g}",
             change.test.questions, change.test.n if change.test.n < change.test.questions else "-",
             WORDS[change.verdict] if change.verdict else "")
            for change in report.changes
        ],
    )  # fmt: skip
    for note in report.notes:
        echo(f"  {note}")


def difference(test: "PairedTest") -> str:
    """`+0.12 [+0.03, +0.21]`."""
    return f"{test.value:+.3f} [{test.low:+.2f}, {test.high:+.2f}]"


def _part(change: "Change") -> str:
    return f"{change.part}, {change.group}" if change.group else change.part
