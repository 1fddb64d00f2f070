"""`graftwork tune FILE`: a sweep, its progress, its trials and the confidence in the best one, and its winner."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graftwork import config
from graftwork.cli.options import LaunchOptions, SpecFile, with_options
from graftwork.cli.plan import print_prediction
from graftwork.cli.render import duration, echo, print_json, print_table, show_outcomes, stderr
from graftwork.cli.stages import spec_to_run
from graftwork.errors import ConfigError
from graftwork.planning.hardware import with_gpus

TrialTarget = Annotated[
    str | None,
    typer.Option(
        "--trial-target",
        metavar="TARGET",
        help="Run each trial as its own job on this target, e.g. to queue distributed trials one by one.",
    ),
]

if TYPE_CHECKING:
    from graftwork.report.sweep_schema import SweepRecord
    from graftwork.tuning.remote_trial import Elsewhere
    from graftwork.tuning.spec import TuneSpec
    from graftwork.tuning.trials import Pace, TrialRecord, TuneProgress, TuneReport, Winner

EVERY_S = 10.0
"""Between two lines where there is no terminal."""
MOST_ROWS = 12
BARS = "▁▂▃▄▅▆▇█"
CURVE = 12
STYLES = {"running": "cyan", "finished": "", "stopped": "dim", "failed": "red", "pending": "dim"}

Update = Callable[["TuneProgress"], None]


@with_options
def tune(
    file: SpecFile,
    options: LaunchOptions,
    trial_target: TrialTarget = None,
) -> None:
    """Search hyperparameters; print the trials and the best one with its uncertainty. Trains the winner if
    the spec has `winner`.

    `graftwork plan FILE` predicts time and memory. A finished sweep is reused; an unfinished one resumes.
    """
    from graftwork.tuning.spec import TuneSpec

    elsewhere = None
    if trial_target is None:
        spec = spec_to_run("tune", file, options)
    else:
        elsewhere = _target_of_trials(options, trial_target)
        given = config.load(file, options.sets, expect="tune")
        assert isinstance(given, TuneSpec)
        spec, _ = with_gpus(given, elsewhere.accelerators(given.root))
    if spec is None:
        return
    from graftwork.cluster.session import session
    from graftwork.stages.shadow import check_shadow, place_shadow
    from graftwork.tuning.report import SweepEnd, sweep_record
    from graftwork.tuning.run import check, tune

    assert isinstance(spec, TuneSpec)
    check_shadow(spec)
    notes = check(spec)
    if not options.as_json:
        for note in notes:
            echo(f"note: {note}")
        print_prediction(spec, file.parent, options.target)
    with sweep_progress(f"tune {spec.name}", options.as_json) as update, session(options.target) as here:
        report = here.run(tune, spec, on_progress=update, elsewhere=elsewhere)
    shadow = place_shadow(spec, report) if spec.winner and spec.winner.shadow else None
    sweep = sweep_record(spec, report.trials, SweepEnd.of(report))
    if options.as_json:
        print_json(sweep_json(report, sweep, shadow))
    else:
        show(spec, report, sweep, shadow)


def _target_of_trials(options: LaunchOptions, trial_target: str) -> "Elsewhere":
    """Return the target of the trial jobs. Raises ConfigError if the driver of the sweep would not run here."""
    from graftwork.tuning.remote_trial import Elsewhere

    if options.target != "local" or options.detach:
        other = "--detach" if options.detach else f"--target {options.target}"
        raise ConfigError(
            f"--trial-target {trial_target} with {other}",
            "two targets for one sweep",
            "with --trial-target the driver of the sweep runs here, in the foreground",
            f"remove {other}",
        )
    return Elsewhere(trial_target, options.cluster_spec().model_dump(mode="json"))


def sweep_json(report: "TuneReport", sweep: "SweepRecord", shadow: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON document: `heat.rates` has one learning rate for all ranks, `stops` the saved steps."""
    analysis = sweep.model_dump(mode="json", include={"stops": True, "heat": {"rates"}})
    return {**report.as_dict(), **analysis, "shadow": shadow}


def show(spec: "TuneSpec", report: "TuneReport", sweep: "SweepRecord", shadow: dict[str, Any] | None) -> None:
    """Print the trials and the finals, the verdict with its evidence, and the winner."""
    from graftwork.report.sweep_views import rates_words, stops_words
    from graftwork.tuning.report import settings

    _show_trials(report)
    for line in (report.choice.verdict, *report.choice.notes):
        echo(line)
    if report.choice.front:
        objectives = ", ".join(goal.metric for goal in spec.objectives)
        echo(f"no trial beats these in all of {objectives}: {', '.join(report.choice.front)}")
    if sweep.heat is not None and sweep.heat.rates is not None:
        echo(rates_words(sweep.heat.rates))
    if sweep.stops is not None:
        echo(stops_words(sweep.stops))
    echo(f"best: {settings(report.best)}")
    if report.winner is not None:
        _show_winner(spec, report.winner)
    if shadow is not None:
        _show_shadow(shadow)
    echo(f"report: {report.page}")


def _show_trials(report: "TuneReport") -> None:
    """Print the trials, lowest loss first, those that ran to their end before the others; then the finals."""
    searched = [trial for trial in report.trials if trial.repeat_of is None]
    keys = list(dict.fromkeys(key for trial in searched for key in trial.values))
    order = {"finished": 0, "stopped": 1, "failed": 2}
    ordered = sorted(searched, key=lambda t: (order.get(t.state, 3), t.losses[-1][1] if t.losses else 0.0))
    print_table(
        f"{report.run_id}{' (reused)' if report.reused else ''}",
        ("trial", *_short(keys), "loss", "steps", "state", "trained", "s/step", "time"),
        [
            (
                trial.trial_id,
                *[trial.values.get(key, "-") for key in keys],
                f"{trial.losses[-1][1]:.4f}" if trial.losses else "-",
                trial.steps,
                trial.state,
                *_cost(trial),
                duration(trial.wall_s),
            )
            for trial in ordered
        ],
    )
    _show_finals(report, keys)


def _show_finals(report: "TuneReport", keys: list[str]) -> None:
    """Print a line per finalist: its loss with each seed, and their mean."""
    repeats = {(one.repeat_of, one.values["seed"]): one for one in report.trials if one.repeat_of is not None}
    if not repeats:
        return
    seeds = list(dict.fromkeys(seed for _, seed in repeats))
    rows = []
    for trial in report.trials:
        runs = [trial, *(repeats.get((trial.trial_id, seed)) for seed in seeds)]
        if any(runs[1:]):
            losses = [
                "-" if run is None else f"{run.losses[-1][1]:.4f}" if run.state == "finished" else run.state
                for run in runs
            ]
            ended = [run.losses[-1][1] for run in runs if run is not None and run.state == "finished"]
            mean = fmean(ended) if len(ended) == len(runs) else math.inf
            mark = "taken" if trial.trial_id == report.best_id else ""
            values = [trial.values.get(key, "-") for key in keys]
            row = (trial.trial_id, *values, *losses, f"{mean:.4f}" if math.isfinite(mean) else "-", mark)
            rows.append((mean, row))
    columns = ("trial", *_short(keys), "search", *[f"seed {seed}" for seed in seeds], "mean", "")
    print_table("finals: held-out loss by seed", columns, [row for _, row in sorted(rows, key=lambda one: one[0])])


def _short(keys: list[str]) -> list[str]:
    """Return the last part of each key where it is unique, else the key."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]


def _cost(trial: "TrialRecord") -> tuple[str, str]:
    trained, step_s = trial.metrics.get("trained_parameters"), trial.metrics.get("step_s")
    said = "-" if trained is None else f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:.0f}"
    return said, "-" if step_s is None else f"{step_s:.2f}"


def _show_winner(spec: "TuneSpec", winner: "Winner") -> None:
    from graftwork.tuning.winner import root_of

    report, root = winner.train, f" --root {root_of(spec)}"
    held_out = f", {report.held_out}" if report.held_out else ""
    took = "reused the finished run" if report.reused else f"{report.steps} steps in {duration(report.wall_s)}"
    echo(f"winner: {report.run_id}, {took}{held_out}; published {report.published_name}")
    if report.outcomes is not None:
        show_outcomes(report.outcomes)
    if winner.alias is not None:
        name = f"{spec.train.name}@{winner.alias}"
        if winner.moved:
            echo(f"{name}: {winner.before or 'nothing'} -> {report.version} ({winner.why})")
            if winner.before:
                echo(f"  back: graftwork adapters rollback {name}{root}")
        else:
            echo(f"{name} was not moved: {winner.why}")
            if winner.before != report.version:
                echo(f"  move it all the same: graftwork adapters promote {report.adapter} {winner.alias}{root}")
    for note in report.notes:
        echo(f"  {note}")
    if report.page:
        echo(f"report of the winner: {report.page}")


def _show_shadow(found: dict[str, Any]) -> None:
    """Print the shadow test of the winner, with the command that starts it."""
    if "why" in found:
        echo(f"shadow: {found['why']}")
        return
    written = f"shadow: {found['winner']} next to {found['current']}, {found['spec']}"
    if found["started"] is not None:
        echo(f'{written}; started: request it with "model": "{found["started"]["model"]}"')
    else:
        echo(f"{written}\n  start it: graftwork experiment start {found['spec']}")


@contextmanager
def sweep_progress(label: str, quiet: bool, console: Console = stderr, every_s: float = EVERY_S) -> Iterator[Update]:
    """Yield a function that takes each `TuneProgress`; silent when `quiet`."""
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
    """Prints a line when a trial ended or the best changed, at most one in `every_s`, and a last one."""

    def __init__(self, label: str, console: Console, every_s: float) -> None:
        self._label, self._console, self._every_s = label, console, every_s
        self._printed_at = -math.inf
        self._printed = ""
        self._last: TuneProgress | None = None

    def update(self, progress: "TuneProgress") -> None:
        """Record the progress; print it if `every_s` has passed."""
        self._last = progress
        if time.monotonic() - self._printed_at >= self._every_s:
            self._print(progress)

    def close(self) -> None:
        """Print the last progress."""
        if self._last is not None:
            self._print(self._last)

    def _print(self, progress: "TuneProgress") -> None:
        from graftwork.tuning.trials import pace

        line = f"{counts(progress)}; {progress.text}"
        if line != self._printed and progress.trials:
            left = f", {left_words(pace(progress))}" if progress.done < progress.total else ""
            when = f"{duration(progress.elapsed_s)} so far{left}"
            self._console.print(f"{self._label}: {line}; {when}", markup=False, soft_wrap=True)
            self._printed, self._printed_at = line, time.monotonic()


class _TrialTable:
    """The live table; its clock advances between changes."""

    def __init__(self, label: str, console: Console) -> None:
        self._label, self._console = label, console
        self._progress: TuneProgress | None = None
        self._at = time.monotonic()

    def update(self, progress: "TuneProgress") -> None:
        """Show this from now on."""
        self._progress, self._at = progress, time.monotonic()

    def render(self) -> RenderableType:
        """Return the table of the last progress."""
        if self._progress is None:
            return Text(f"{self._label}: starting")
        rows = max(3, min(MOST_ROWS, self._console.height - 8))
        return board(self._label, self._progress, time.monotonic() - self._at, rows)


def board(label: str, progress: "TuneProgress", since_s: float, rows: int) -> RenderableType:
    """Return the whole table, at most `rows` trials; `since_s`: since the progress was reported."""
    from graftwork.report.format import clock
    from graftwork.tuning.trials import pace

    found, unit = pace(progress), "GPU-min" if progress.gpus else "core-min"
    total = f" of about {found.device_total_s / 60:.1f}" if found.device_total_s else ""
    cost = f"{found.device_s / 60:.1f}{total} {unit}"
    elapsed = f"{clock(progress.elapsed_s + since_s)} elapsed"
    left = f", {left_words(found, since_s)}" if progress.done < progress.total else ""
    heads = [
        Text.assemble((label, "bold"), f"  {counts(progress)}"),
        Text(f"{elapsed}{left}; {cost}"),
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
    """`about 3:10 left (2:40 to 3:50, n=12)`; n: trials behind the estimate."""
    from graftwork.report.format import clock

    if found.left_s is None:
        return "time left not known yet"
    left = max(found.left_s - since_s, 0.0)
    if found.low_s is None or found.high_s is None:
        return f"at most {clock(left)} left"
    low, high = max(found.low_s - since_s, 0.0), max(found.high_s - since_s, 0.0)
    return f"about {clock(left)} left ({clock(low)} to {clock(high)}, n={found.ended})"


def shown_trials(progress: "TuneProgress", rows: int) -> tuple[Sequence["TrialRecord"], int]:
    """Return the running trials, the best that ended in half of the rows, and how many trials are left out."""
    running = [trial for trial in progress.trials if trial.state == "running"]
    ended = sorted((trial for trial in progress.trials if trial.ended or trial.state == "failed"), key=_sort_key)
    newest = running[-max(rows - min(len(ended), rows // 2), 1) :]
    shown = [*newest, *ended[: rows - len(newest)]]
    return shown, len(running) + len(ended) - len(shown)


def _sort_key(trial: "TrialRecord") -> tuple[bool, int, float]:
    return trial.state == "failed", -trial.steps, trial.losses[-1][1] if trial.losses else math.inf


def _table(progress: "TuneProgress", shown: Sequence["TrialRecord"], since_s: float) -> Table:
    from graftwork.report.format import clock
    from graftwork.tuning.trials import label_points, took_s

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
    """Return the lowest loss and the median of the first ones: one scale for all curves."""
    losses = [loss for trial in progress.trials for _, loss in trial.losses if math.isfinite(loss)]
    firsts = sorted(trial.losses[0][1] for trial in progress.trials if trial.losses)
    return min(losses, default=0.0), firsts[len(firsts) // 2] if firsts else 1.0


def sparkline(losses: Sequence[float], low: float, high: float) -> str:
    """Return a bar per report, between `low` and `high`; a loss above `high`, or no number, has the full height."""
    span = (high - low) or 1.0
    heights = [min(max((loss - low) / span, 0.0), 1.0) if math.isfinite(loss) else 1.0 for loss in losses]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
