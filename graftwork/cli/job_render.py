"""Jobs as a table that fits the terminal, and one job in full."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftwork.cli.render import console, echo
from graftwork.cluster.jobs.backend import most_usd
from graftwork.cluster.jobs.models import JobStatus
from graftwork.cluster.jobs.store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import GraftworkError
from graftwork.storage.store import DEFAULT_ROOT, Store

STYLES = {"running": "cyan", "succeeded": "green", "failed": "red", "lost": "red", "stopped": "yellow"}
WIDE, NARROW = 110, 76
PIPED = 400
"""Width where nobody looks: nothing is cut."""
GAP = 2


def show_list(statuses: Sequence[JobStatus], root: str, of: int, out: Console | None = None) -> None:
    """A line a job. A narrow terminal gets fewer columns; an id is never cut, and in a pipe nothing is."""
    out = out or (console if console.is_terminal else Console(file=sys.stdout, width=PIPED, highlight=False))
    if not statuses:
        return echo(f"no jobs in {root}")
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
        table.add_row(*[Text(cell) for cell in row], style=STYLES.get(status.state, ""))
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


def show_details(told: dict[str, Any], root: str, status: JobStatus) -> None:
    """A line a fact."""
    echo(f"{status.job_id}: {status.state} on {status.on} ({status.kind}, attempt {status.attempt})")
    beat = None if status.ended or told["driver"] is None else f"{told['heartbeat_age_s']:.0f} s ago, {told['driver']}"
    facts = {
        "why": status.why,
        "exit code": None if status.exit_code is None else str(status.exit_code),
        "submitted": when(status.submitted_at),
        "started": when(status.started_at) if status.started_at else None,
        "ended": when(status.ended_at) if status.ended_at else None,
        "heartbeat": beat,
        "progress": status.progress,
        "cost": _cost(told),
        "store": told["root"],
    }
    for name, value in facts.items():
        if value:
            echo(f"  {name:10s} {value}")
    for name in ("left", "events", "next"):
        for number, line in enumerate(told[name]):
            echo(f"  {name if number == 0 else '':10s} {_event(line) if name == 'events' else line}")


def _cost(told: dict[str, Any]) -> str | None:
    if told["usd"] is None:
        return None
    most = f" of at most ${told['most_usd']:.2f}" if told["most_usd"] is not None else ""
    return f"${told['usd']:.2f} in this attempt{most}"


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


# A job in words: a line, its age, what it cost, what it left, and what one can do now.


LEFT = re.compile(r"^(published |report: |report of the winner: |winner: |best: |serving at )", re.MULTILINE)
"""What the stages say last: where to find what they made."""


def line_of(status: JobStatus) -> str:
    """`cards-0123456789 attempt 2 on local: running; its driver was heard 3 s ago`."""
    why = f"; {status.why}" if status.why else ""
    return f"{status.job_id} attempt {status.attempt} on {status.on}: {status.state}{why}"


def root_flag(root: str) -> str:
    """` --root ROOT`, for a command that is to find the same store; empty for the default of this folder."""
    return "" if Store(root).uri == Store(DEFAULT_ROOT).uri else f" --root {root}"


def is_away(status: JobStatus) -> bool:
    """Whether its place was asked and did not answer, as `StoredBackend` says it."""
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
