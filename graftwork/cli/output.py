"""Tables for people, JSON for machines, progress bars, and errors in both forms."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from graftwork.cluster.fence import Fence
from graftwork.errors import GraftworkError

console = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

LINE_S = 5.0

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Sets = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the spec, e.g. optim.lr=1e-3.")
]

SpecFile = Annotated[Path, typer.Argument(metavar="FILE", help="YAML spec of the stage; see examples/.")]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="WHERE",
        help="local (a private Ray), ray://HOST:PORT, http://HOST:PORT of a Ray, or k8s:CONTEXT/NAMESPACE.",
    ),
]
Detach = Annotated[bool, typer.Option("--detach", help="Leave it to run; follow it with `graftwork jobs`.")]
Cluster = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="What the place is like; else cluster.yaml here.")
]


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_error(error: GraftworkError, as_json: bool) -> None:
    """The error on stderr: four lines for people, one object for machines."""
    if as_json:
        parts = {
            "type": type(error).__name__,
            "asked": error.asked,
            "found": error.found,
            "rule": error.rule,
            "next": error.next_move,
            "also": list(error.also),
            "exit_code": error.exit_code,
        }
        sys.stderr.write(json.dumps({"error": parts}, ensure_ascii=False) + "\n")
    else:
        stderr.print(error.text(), style="red", markup=False, soft_wrap=True)


_COPIED = ("task", "version", "run", "job", "adapter")
_WIDE = 1000
"""Characters."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table; columns whose name ends in a unit or holds numbers are right-aligned. Off a terminal it is as wide as it
    is, and names that are copied are in one piece in any case."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        numeric = all(isinstance(row[index], int | float) or _numeric(str(row[index])) for row in rows) and rows
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=column in _COPIED)
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console.print(table, width=None if console.is_terminal else _WIDE, crop=False)


def say(line: str) -> None:
    """One line of finding, for people."""
    console.print(line, markup=False, soft_wrap=True)


def gib(size_bytes: float) -> str:
    """Bytes as GiB with two digits, or MiB below a tenth."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 0.1 * 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as `3.2 s`, `4 min 05 s` or `2 h 03 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def progress_bar(label: str, quiet: bool) -> Iterator[Any]:
    """A bar with count, elapsed time, ETA and a free text; yields `update(done, total, text)`. Silent when `quiet`.

    In a job, whose log nobody sees as a terminal, a line now and then: `jobs status` shows the last one.
    """
    if Fence.of_environment() is not None and not quiet:
        lines = _Lines(label)
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


class _Lines:
    """A line at most every LINE_S, and the last one."""

    def __init__(self, label: str) -> None:
        self._label, self._line, self._printed, self._next = label, "", "", 0.0

    def update(self, done: int, total: int, text: str = "") -> None:
        """Note how far it is; say so if it is time."""
        self._line = f"{self._label}: {done} of {total}" + (f", {text}" if text else "")
        if time.monotonic() >= self._next:
            self.close()

    def close(self) -> None:
        """Say how far it came."""
        if self._line != self._printed:
            stderr.print(self._line, markup=False, soft_wrap=True)
            self._printed, self._next = self._line, time.monotonic() + LINE_S


def _numeric(text: str) -> bool:
    return bool(text) and text[0] in "+-0123456789.[" and any(c.isdigit() for c in text)
