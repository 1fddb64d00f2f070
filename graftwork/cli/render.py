"""Tables for people, JSON for machines, progress bars, and errors in both forms."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.models import Finding
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.report.evaluation_schema import Change, ExperimentReport, PairedTest


# Findings of preflight and doctor as a list for people: the code, where, what is wrong and the hint.


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


# How an online experiment's report is told in a terminal.


def show_online(report: "ExperimentReport") -> None:
    """Differences with sequences, guardrails, and the verdict in a sentence."""
    from graftwork.report import evaluation_views
    from graftwork.report import format as words

    unit = "prompts" if report.mode == "shadow" else "units"
    print_table(
        f"{report.name}: {report.metric}, {report.mode}, {words.count(report.rows)} rows",
        ("arm", unit, "plain mean", "answers", "failed"),
        [
            (arm.name, arm.units, words.NONE if arm.mean is None else f"{arm.mean:.3f}", arm.answers, arm.errors)
            for arm in report.arms
        ],
    )
    print_table(
        f"against {report.control} (holds at every look)",
        ("arm", evaluation_views.estimator(report.mode), unit, "e-value", "verdict", "would decide"),
        [
            (
                one.arm,
                f"{evaluation_views.signed(one.estimate)} {evaluation_views.effect_interval(one)}",
                one.n,
                evaluation_views.evidence(one.e_value),
                one.verdict,
                words.NONE if one.n_needed is None else words.count(one.n_needed),
            )
            for one in report.contrasts
        ],
    )
    if report.guardrails:
        rows = [
            (g.arm, g.says, words.NONE if g.value is None else f"{g.value:.3f}", g.n, evaluation_views.guard_state(g))
            for g in report.guardrails
        ]
        print_table("guardrails", ("arm", "bound", "seen", "n", "state"), rows)
    for note in report.notes:
        echo(f"  {note}")
    echo(report.sentence)


# What a run gained and lost, as a table.


def show_outcomes(found: Mapping[str, Any]) -> None:
    """Every metric before and after, and of which changes one can be sure."""
    from graftwork.report.evaluation_schema import OutcomesReport
    from graftwork.report.evaluation_views import WORDS
    from graftwork.report.format import rounded

    report = OutcomesReport.model_validate(found)
    print_table(
        f"gained and lost (paired, {100 * (1 - report.alpha):g}% intervals, Holm over {report.family})",
        ("part", "metric", "before", "after", "difference", "p", "questions", "clusters", ""),
        [
            (
                _part(change),
                change.metric,
                rounded(change.before.value, 3),
                rounded(change.after.value, 3),
                difference(change.test),
                "-" if change.p_adjusted is None else f"{change.p_adjusted:.2g}",
                change.test.questions,
                change.test.n if change.test.n < change.test.questions else "-",
                WORDS[change.verdict] if change.verdict else "",
            )
            for change in report.changes
        ],
    )
    for note in report.notes:
        echo(f"  {note}")


def difference(test: "PairedTest") -> str:
    """`+0.12 [+0.03, +0.21]`."""
    return f"{test.value:+.3f} [{test.low:+.2f}, {test.high:+.2f}]"


def _part(change: "Change") -> str:
    return f"{change.part}, {change.group}" if change.group else change.part


console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

LINE_S = 5.0
"""Seconds between two lines of progress in the log of a job."""
PLAIN_LINE_S = 60.0
"""The same where there is no terminal: pipes, CI, notebooks."""


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_error(error: GraftworkError, as_json: bool) -> None:
    """The error on stderr: four lines for people, one object for machines."""
    if as_json:
        parts = {
            "type": type(error).__name__,
            "subject": error.subject,
            "problem": error.problem,
            "rule": error.rule,
            "hint": error.hint,
            "also": list(error.also),
            "exit_code": error.exit_code,
        }
        sys.stderr.write(json.dumps({"error": parts}, ensure_ascii=False) + "\n")
    else:
        stderr.print(error.text(), style="red", markup=False, soft_wrap=True)


_COPIED = ("task", "version", "run", "job", "adapter", "arm", "code")
_LEAST_WIDTH = 12
"""Characters that a column of free text keeps on a terminal."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with one line per row. Numbers are right-aligned.

    A terminal that is too narrow shortens free text with an ellipsis, never a number or a name that is copied. Pipes
    and files get every cell in full.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    numeric = [bool(rows) and all(_numeric(row[index]) for row in cells) for index in range(len(columns))]
    widths = [max(cell_len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
    if console.is_terminal:
        free = [i for i, name in enumerate(columns) if not numeric[i] and name not in _COPIED]
        excess = sum(widths) + 2 * (len(columns) - 1) - console.width
        while excess > 0 and (index := max(free, key=widths.__getitem__, default=-1)) >= 0:
            if widths[index] <= max(_LEAST_WIDTH, cell_len(columns[index])):
                break
            widths[index], excess = widths[index] - 1, excess - 1
    echo(title, "bold")
    for number, row in enumerate([list(columns), *cells]):
        fitted = [_fit(*cell) for cell in zip(row, widths, numeric, strict=True)]
        echo("  ".join(fitted).rstrip(), "" if number else "dim")


def _fit(cell: str, width: int, right: bool) -> str:
    if cell_len(cell) > width:
        return set_cell_size(cell, width - 1) + "…"
    return cell.rjust(width) if right else set_cell_size(cell, width)


def echo(line: str, style: str = "") -> None:
    """Print one line for people, however long, without markup."""
    console.print(line, style=style, markup=False, soft_wrap=True)


def gib(size_bytes: float) -> str:
    """Return bytes as GiB with two digits, as MiB below a tenth of a GiB, as KiB below a tenth of a MiB."""
    if size_bytes >= 0.1 * 2**30:
        return f"{size_bytes / 2**30:.2f} GiB"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 0.1 * 2**20 else f"{size_bytes / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """Seconds as `3.2 s`, `4 min 05 s` or `2 h 03 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Any]:
    """Show a bar with count, times and a free text; yields `update(done, total, text)`. Silent when `quiet`.

    Without a terminal it prints a line a minute; in a job a line every LINE_S, of which `jobs status` shows the last.
    """
    in_job = Fence.from_environment() is not None
    if not quiet and (in_job or not stderr.is_terminal):
        lines = _ProgressLines(label, LINE_S if in_job else PLAIN_LINE_S)
        yield lines.update
        lines.close()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=stderr, transient=True, disable=quiet) as bars:
        task = bars.add_task(label, total=None, text="")

        def update(done: int, total: int, text: str = "") -> None:
            bars.update(task, completed=done, total=total, text=text)

        yield update


class _ProgressLines:
    """A line at most every `every_s`, and the last one."""

    def __init__(self, label: str, every_s: float) -> None:
        self._label, self._every_s = label, every_s
        self._line, self._printed, self._next = "", "", 0.0

    def update(self, done: int, total: int, text: str = "") -> None:
        """Note how far it is; say so if it is time."""
        self._line = f"{self._label}: {done} of {total}" + (f", {text}" if text else "")
        if time.monotonic() >= self._next:
            self.close()

    def close(self) -> None:
        """Say how far it came."""
        if self._line != self._printed:
            stderr.print(self._line, markup=False, soft_wrap=True)
            self._printed, self._next = self._line, time.monotonic() + self._every_s


def _numeric(text: str) -> bool:
    return bool(text) and text[0] in "+-0123456789.[" and any(c.isdigit() for c in text)
