"""Output of all commands: tables and progress bars for people, JSON for machines, errors, findings and jobs."""

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from graftwork.cluster.jobs.backend import most_usd
from graftwork.cluster.jobs.fencing import Fence
from graftwork.cluster.jobs.launch import root_flag
from graftwork.cluster.jobs.models import Finding, JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import GraftworkError

if TYPE_CHECKING:
    from graftwork.report.evaluation_schema import PairedTest

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

LINE_S = 5.0
"""Seconds between two lines of progress in the log of a job."""
PLAIN_LINE_S = 60.0
"""The same where there is no terminal: pipes, CI, notebooks."""
LEFT = re.compile(r"^(published |report: |report of the winner: |winner: |best: |serving at )", re.MULTILINE)
"""Last lines of the stages: the names and addresses of their results."""
STATE_STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "lost": "red", "stopped": "yellow"}
WIDE, NARROW = 110, 76
PIPED = 400
"""Width in pipes and files: nothing is cut."""
GAP = 2


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


_NUMERIC = re.compile(r"[0-9]|[-+.\[].*[0-9]")
_COPIED = ("task", "version", "run", "job", "adapter", "arm", "code")
_LEAST_WIDTH = 12
"""Characters that a column of free text keeps on a terminal."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with one line per row. Numbers are right-aligned.

    A terminal that is too narrow shortens free text with an ellipsis, never a number or a name that is copied. Pipes
    and files get every cell in full.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    numeric = [bool(rows) and all(_NUMERIC.match(row[index]) for row in cells) for index in range(len(columns))]
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


def note(line: str) -> None:
    """Print one line on stderr, which is no part of the result."""
    stderr.print(line, markup=False, soft_wrap=True)


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
        """Record the progress; print it if it is time."""
        self._line = f"{self._label}: {done} of {total}" + (f", {text}" if text else "")
        if time.monotonic() >= self._next:
            self.close()

    def close(self) -> None:
        """Print the last progress."""
        if self._line != self._printed:
            stderr.print(self._line, markup=False, soft_wrap=True)
            self._printed, self._next = self._line, time.monotonic() + self._every_s


def show_findings(findings: Sequence[Finding], nothing: str = "no findings") -> None:
    """Errors first; a line what is wrong, a line the rule, a line the hint."""
    if not findings:
        echo(f"  {nothing}")
        return
    for finding in sorted(findings, key=lambda one: one.level != "error"):
        style = "red" if finding.level == "error" else "yellow"
        console.print(f"  {finding.code}", style=style, markup=False, end="")
        console.print(f"  {finding.where}: {finding.problem}", markup=False, soft_wrap=True)
        if finding.rule:
            echo(f"      rule: {finding.rule}")
        if finding.hint:
            echo(f"      hint: {finding.hint}")


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
                f"{change.part}, {change.group}" if change.group else change.part,
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


def show_list(statuses: Sequence[JobStatus], root: str, of: int, out: Console | None = None) -> None:
    """A line a job. A narrow terminal gets fewer columns; an id is never cut, and in a pipe nothing is."""
    out = out or (console if console.is_terminal else Console(file=sys.stdout, width=PIPED, highlight=False))
    if not statuses:
        echo(f"no jobs in {root}")
        return
    columns = ["job", "kind", "state", "attempt", "where", "age", "progress"]
    columns = [c for c in columns if out.width >= WIDE or c not in ("kind", "where")]
    columns = [c for c in columns if out.width >= NARROW or c not in ("attempt", "progress")]
    rows = [[_plain(_cell(status, column)) for column in columns] for status in statuses]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if "progress" in columns:
        widths[-1] = max(out.width - sum(widths[:-1]) - GAP * (len(widths) - 1), len("progress"))
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, GAP, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        justify: Literal["left", "right"] = "right" if column in ("attempt", "age") else "left"
        table.add_column(column, no_wrap=True, overflow="ellipsis", justify=justify, width=width)
    for status, row in zip(statuses, rows, strict=True):
        table.add_row(*[Text(cell) for cell in row], style=STATE_STYLES.get(status.state, ""))
    out.print(table)
    if of > len(statuses):
        echo(f"the newest {len(statuses)} of {of}; --limit shows more")


def _cell(status: JobStatus, column: str) -> str:
    cells = {
        "job": status.job_id,
        "kind": status.kind,
        "state": status.state,
        "attempt": str(status.attempt),
        "where": status.on,
        "age": age(status.submitted_at),
        "progress": status.progress or status.why,
    }
    return cells[column]


def details(runs: JobStore, status: JobStatus, root: str) -> dict[str, Any]:
    """All that is known of a job, for machines and as the base of what people see."""
    record = runs.job(status.job_id)
    numbers = runs.attempts(status.job_id)
    beat = runs.attempt(status.job_id, status.attempt).heartbeat if numbers else None
    return {
        **asdict(status),
        "root": runs.store.uri,
        "attempts": numbers,
        "heartbeat_age_s": None if status.heartbeat_at is None else max(time.time() - status.heartbeat_at, 0.0),
        "driver": None if beat is None else f"{beat.host}, process {beat.pid}",
        "usd": None if beat is None else beat.usd,
        "most_usd": most_usd(ClusterSpec.model_validate(record.cluster)),
        "limits": record.cluster["limits"],
        "left": left_behind(runs, status) if status.state == "succeeded" else [],
        "events": _events(runs, status),
        "next": list(next_commands(status, root)),
    }


def show_details(shown: dict[str, Any], status: JobStatus) -> None:
    """A line a fact."""
    echo(f"{status.job_id}: {status.state} on {status.on} ({status.kind}, attempt {status.attempt})")
    beat = (
        None if status.ended or shown["driver"] is None else f"{shown['heartbeat_age_s']:.0f} s ago, {shown['driver']}"
    )
    facts = {
        "why": status.why,
        "exit code": None if status.exit_code is None else str(status.exit_code),
        "submitted": when(status.submitted_at),
        "started": when(status.started_at) if status.started_at else None,
        "ended": when(status.ended_at) if status.ended_at else None,
        "heartbeat": beat,
        "progress": status.progress,
        "cost": _cost(shown),
        "store": shown["root"],
    }
    for name, value in facts.items():
        if value:
            echo(f"  {name:10s} {value}")
    for name in ("left", "events", "next"):
        for number, line in enumerate(shown[name]):
            echo(f"  {name if number == 0 else '':10s} {_event(line) if name == 'events' else line}")


def _cost(shown: dict[str, Any]) -> str | None:
    if shown["usd"] is None:
        return None
    most = f" of at most ${shown['most_usd']:.2f}" if shown["most_usd"] is not None else ""
    return f"${shown['usd']:.2f} in this attempt{most}"


def _events(runs: JobStore, status: JobStatus) -> list[dict[str, Any]]:
    """Written by its driver as `<ms>-<what>.json`, oldest first; the last 20."""
    folder = ("jobs", status.job_id, f"a{status.attempt}", "events")
    found: list[dict[str, Any]] = []
    for name in sorted(runs.store.list(*folder))[-20:]:
        at, _, what = name.removesuffix(".json").partition("-")
        try:
            more = runs.store.read_json(*folder, name)
        except GraftworkError:  # half a file of a disk that was full
            more = {}
        found.append({**(more if isinstance(more, dict) else {}), "at": int(at) / 1000, "what": what})
    return found


def _event(event: dict[str, Any]) -> str:
    more = ", ".join(
        f"{key} {value}" for key, value in event.items() if key not in ("at", "what") and value is not None
    )
    clock = time.strftime("%H:%M:%S", time.localtime(event["at"]))
    return f"{clock} {event['what']}" + (f": {more}" if more else "")


def _plain(text: str) -> str:
    """Without what a log could do to a terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def line_of(status: JobStatus) -> str:
    """Return a job as one line: `cards-0123456789 attempt 2 on local: running; its last heartbeat was 3 s ago`."""
    why = f"; {status.why}" if status.why else ""
    return f"{status.job_id} attempt {status.attempt} on {status.on}: {status.state}{why}"


def is_away(status: JobStatus) -> bool:
    """Return whether the job's target did not answer, by the reason that `StoredBackend` gives."""
    return "its place does not answer" in status.why


def age(then: float | None, now: float | None = None) -> str:
    """Since `then`, in one unit: `8s`, `12m`, `3h`, `5d`; `-` for None."""
    if then is None:
        return "-"
    seconds = max((time.time() if now is None else now) - then, 0.0)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size or (seconds >= size and unit == "m"):
            return f"{seconds // size:.0f}{unit}"
    return f"{seconds:.0f}s"


def when(then: float | None) -> str:
    """`2026-03-01 12:00:05 (3h ago)`, by this machine's clock and time zone."""
    if then is None:
        return "-"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(then))} ({age(then)} ago)"


def left_behind(runs: JobStore, status: JobStatus) -> list[str]:
    """The lines of its log that name what it made: adapters, reports, the address it serves at."""
    if status.attempt == 0:
        return []
    text = "".join(runs.logs(status.job_id, status.attempt))
    return [line.rstrip() for line in text.splitlines() if LEFT.match(line)]


def next_commands(status: JobStatus, root: str) -> Iterator[str]:
    """Commands that make sense in its state."""
    job, flag = status.job_id, root_flag(root)
    if status.state in ("submitted", "queued", "pending"):
        yield f"graftwork jobs logs -f {job}{flag}"
        if not status.on.startswith("local"):
            yield f"graftwork doctor --target {status.on}, where it stays so"
        yield f"graftwork jobs cancel {job}{flag}"
    elif status.state in ("running", "suspended"):
        yield f"graftwork jobs logs -f {job}{flag}"
        yield f"graftwork jobs cancel {job}{flag}"
    elif status.state != "succeeded":
        yield f"graftwork jobs logs {job} --tail 40{flag}"
        yield f"graftwork jobs resubmit {job}{flag}: it goes on from the last checkpoint"
