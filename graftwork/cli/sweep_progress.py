"""A sweep while it runs: a table in a terminal, now and then a line elsewhere, nothing for machines."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graftwork.cli.render import duration, stderr

if TYPE_CHECKING:
    from graftwork.tuning.eta import Pace
    from graftwork.tuning.trials import TrialRecord, TuneProgress

EVERY_S = 10.0
"""Between two lines where there is no terminal."""
MOST_ROWS = 12
BARS = "▁▂▃▄▅▆▇█"
CURVE = 12
STYLES = {"running": "cyan", "finished": "", "stopped": "dim", "failed": "red", "pending": "dim"}

Update = Callable[["TuneProgress"], None]


@contextmanager
def sweep_progress(label: str, quiet: bool, console: Console = stderr, every_s: float = EVERY_S) -> Iterator[Update]:
    """Yields what takes each `TuneProgress`; silent when `quiet`."""
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        board = _TrialTable(label, console)
        with Live(get_renderable=board.render, console=console, refresh_per_second=2, transient=True):
            yield board.update
    else:
        lines = _SweepLines(label, console, every_s)
        yield lines.update
        lines.close()


class _SweepLines:
    """A line when a trial ended or the best changed, at most one in `every_s`, and a last one."""

    def __init__(self, label: str, console: Console, every_s: float) -> None:
        self._label, self._console, self._every_s = label, console, every_s
        self._printed_at = -math.inf
        self._said = ""
        self._last: TuneProgress | None = None

    def update(self, progress: "TuneProgress") -> None:
        """Note how it stands; say so if it is time."""
        self._last = progress
        if time.monotonic() - self._printed_at >= self._every_s:
            self._say(progress)

    def close(self) -> None:
        """Say how it stood last."""
        if self._last is not None:
            self._say(self._last)

    def _say(self, progress: "TuneProgress") -> None:
        from graftwork.tuning.eta import pace

        said = f"{counts(progress)}; {progress.text}"
        if said != self._said and progress.trials:
            left = f", {left_words(pace(progress))}" if progress.done < progress.total else ""
            when = f"{duration(progress.elapsed_s)} so far{left}"
            self._console.print(f"{self._label}: {said}; {when}", markup=False, soft_wrap=True)
            self._said, self._printed_at = said, time.monotonic()


class _TrialTable:
    """The table; between changes its clock goes on."""

    def __init__(self, label: str, console: Console) -> None:
        self._label, self._console = label, console
        self._progress: TuneProgress | None = None
        self._at = time.monotonic()

    def update(self, progress: "TuneProgress") -> None:
        """Show this from now on."""
        self._progress, self._at = progress, time.monotonic()

    def render(self) -> RenderableType:
        """As it stands now."""
        if self._progress is None:
            return Text(f"{self._label}: starting")
        rows = max(3, min(MOST_ROWS, self._console.height - 8))
        return board(self._label, self._progress, time.monotonic() - self._at, rows)


def board(label: str, progress: "TuneProgress", since_s: float, rows: int) -> RenderableType:
    """The whole board, at most `rows` trials; `since_s`: since the progress was told."""
    from graftwork.report.format import clock
    from graftwork.tuning.eta import pace

    found = pace(progress)
    elapsed = f"{clock(progress.elapsed_s + since_s)} elapsed"
    left = f", {left_words(found, since_s)}" if progress.done < progress.total else ""
    heads = [
        Text.assemble((label, "bold"), f"  {counts(progress)}"),
        Text(f"{elapsed}{left}; {cost_words(found, progress.gpus)}"),
        Text(progress.text, style="yellow" if progress.trouble else "green"),
    ]
    shown, more = shown_trials(progress, rows)
    tail = [Text(f"and {more} more", style="dim")] if more else []
    return Group(*heads, *([_table(progress, shown, since_s)] if shown else []), *tail)


def counts(progress: "TuneProgress") -> str:
    """`12 of 20 done (5 finished, 7 stopped), 2 running`."""
    states = [trial.state for trial in progress.trials]
    done = [f"{states.count(state)} {state}" for state in ("finished", "stopped", "failed") if state in states]
    ended = f" ({', '.join(done)})" if done else ""
    return f"{progress.done} of {progress.total} done{ended}, {states.count('running')} running"


def left_words(found: "Pace", since_s: float = 0.0) -> str:
    """`about 3:10 left (2:40 to 3:50, n=12)`; n are the trials that it goes by."""
    from graftwork.report.format import clock

    if found.left_s is None:
        return "time left not known yet"
    left = max(found.left_s - since_s, 0.0)
    if found.low_s is None or found.high_s is None:
        return f"at most {clock(left)} left"
    low, high = max(found.low_s - since_s, 0.0), max(found.high_s - since_s, 0.0)
    return f"about {clock(left)} left ({clock(low)} to {clock(high)}, n={found.ended})"


def cost_words(found: "Pace", gpus: float) -> str:
    """`9.1 of about 15 core-min`."""
    unit = "GPU-min" if gpus else "core-min"
    total = f" of about {found.device_total_s / 60:.1f}" if found.device_total_s else ""
    return f"{found.device_s / 60:.1f}{total} {unit}"


def shown_trials(progress: "TuneProgress", rows: int) -> tuple[Sequence["TrialRecord"], int]:
    """Those that run, half of the rows for the best that ended; and how many are left out."""
    running = [trial for trial in progress.trials if trial.state == "running"]
    ended = sorted((trial for trial in progress.trials if trial.ended or trial.state == "failed"), key=_place)
    kept = running[-max(rows - min(len(ended), rows // 2), 1) :]
    shown = [*kept, *ended[: rows - len(kept)]]
    return shown, len(running) + len(ended) - len(shown)


def _place(trial: "TrialRecord") -> tuple[bool, int, float]:
    return trial.state == "failed", -trial.steps, trial.losses[-1][1] if trial.losses else math.inf


def _table(progress: "TuneProgress", shown: Sequence["TrialRecord"], since_s: float) -> Table:
    from graftwork.report.format import clock
    from graftwork.tuning.eta import took_s
    from graftwork.tuning.trials import label_points

    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("trial", ratio=1, no_wrap=True, overflow="ellipsis")
    for column in ("step", "loss", "curve", "state", "time"):
        table.add_column(column, justify="left" if column in ("curve", "state") else "right", no_wrap=True)
    low, high = _range(progress)
    for trial, name in zip(shown, label_points([trial.values for trial in shown]), strict=True):
        last = f"{trial.losses[-1][1]:.3f}" if trial.losses else "-"
        of = f"{trial.steps}/{progress.steps}" if progress.steps else str(trial.steps)
        curve = sparkline([loss for _, loss in trial.losses][-CURVE:], low, high)
        took = clock(took_s(trial, progress.elapsed_s + since_s))
        table.add_row(name, of, last, curve, trial.state, took, style=STYLES[trial.state])
    return table


def _range(progress: "TuneProgress") -> tuple[float, float]:
    """From the lowest loss to the median of the first ones: one scale for all curves."""
    losses = [loss for trial in progress.trials for _, loss in trial.losses if math.isfinite(loss)]
    firsts = sorted(trial.losses[0][1] for trial in progress.trials if trial.losses)
    return min(losses, default=0.0), firsts[len(firsts) // 2] if firsts else 1.0


def sparkline(losses: Sequence[float], low: float, high: float) -> str:
    """A bar a report, between `low` and `high`; what lies beyond, or is no number, is as high as they go."""
    span = (high - low) or 1.0
    heights = [min(max((loss - low) / span, 0.0), 1.0) if math.isfinite(loss) else 1.0 for loss in losses]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
