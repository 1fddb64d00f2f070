"""Jobs as a table that fits the terminal, and one job in full."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from graftwork.cli.job_words import age, left_behind, next_commands, when
from graftwork.cli.output import console, echo
from graftwork.cluster.backend import JobStatus
from graftwork.cluster.cost import most_usd
from graftwork.cluster.run_store import JobStore
from graftwork.cluster.spec import ClusterSpec
from graftwork.errors import GraftworkError

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
        "job": status.job_id, "kind": status.kind, "state": status.state, "attempt": str(status.attempt),
        "where": status.on, "age": age(status.submitted_at), "progress": status.progress or status.why,
    }  # fmt: skip
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
