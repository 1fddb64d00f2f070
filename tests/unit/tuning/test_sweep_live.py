"""What a person sees of a sweep while it runs, and what it says of the time and the cost that are left."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from graftwork.cli.tune import board, shown_trials, sparkline, sweep_progress
from graftwork.tuning.search import Values
from graftwork.tuning.trials import State, TrialRecord, TuneProgress, pace


def trial(name: str, state: State, *losses: float) -> TrialRecord:
    steps = tuple((2 * (index + 1), loss) for index, loss in enumerate(losses))
    values: Values = {"adapter.rank": 16, "optim.lr": float(f"0.00{name}")}
    return TrialRecord(name, values, steps, state, 2 * len(losses), wall_s=5.0 * len(losses))


def progress(*trials: TrialRecord, total: int = 6, elapsed_s: float = 20.0, **more: Any) -> TuneProgress:
    return TuneProgress(trials, total, elapsed_s, **{"steps": 8, "at_once": 2, **more})


HALF = (
    trial("1", "finished", 3.0, 2.0, 1.5, 1.0),
    trial("2", "stopped", 4.0, 3.0),
    trial("3", "finished", 3, 2, 1, 0.9),
)


def seen(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, height=24)


# Pace.


def test_time_is_left_for_the_steps_that_are_left() -> None:
    """20 steps in 20 s. To come: 3 trials of 20 / 3 steps each, as those that ended."""
    found = pace(progress(*HALF, cpus=2.0))
    assert found.left_s == pytest.approx(20)
    assert [found.low_s, found.high_s] == pytest.approx([12, 24]), "8 steps a trial at most"
    assert (found.ended, found.device_s) == (3, 2 * 50.0)
    assert found.device_total_s == pytest.approx(200)


def test_before_three_ended_the_time_is_one_at_most() -> None:
    found = pace(progress(*HALF[:2]))
    assert found.left_s == pytest.approx(4 * 8 * 20 / 12)
    assert (found.low_s, found.high_s) == (None, None)


def test_the_last_trial_alone_takes_its_time() -> None:
    """8 steps at the pace of one of two places: twice as long as 8 of 20 steps in 20 s."""
    found = pace(progress(*HALF[:2], trial("4", "running", 3.0), total=3))
    assert found.left_s == pytest.approx(2 * 6 * 20 / 14)


def test_a_trial_that_goes_on_from_another_counts_its_own_steps() -> None:
    """12 steps were taken, not 16; three of four segments are over, and the last takes 4 steps as they did."""
    first, other = trial("1", "finished", 3.0, 2.0), trial("2", "finished", 3.0, 2.0)
    second = replace(trial("3", "finished", 3.0, 2.0, 1.5, 1.0), parent="1")
    assert pace(progress(first, other, second, total=4, at_once=1)).left_s == pytest.approx(4 * 20 / 12)


def test_nothing_is_known_before_the_first_report() -> None:
    assert pace(progress(trial("1", "running"))).left_s is None


# What is shown.


@pytest.mark.parametrize("count", [0, 1, 3, 200])
@pytest.mark.parametrize("width", [80, 40])
def test_a_board_fits_its_terminal(count: int, width: int) -> None:
    states: tuple[State, ...] = ("running", "finished", "failed", "stopped")
    trials = [trial(f"{100 + index}", states[index % 4], *[2.0, float("nan")][: index % 3]) for index in range(count)]
    screen = console(terminal=True, width=width)
    with screen.capture() as got:
        screen.print(board("tune a-sweep", progress(*trials, total=200), 1.0, rows=10))
    lines = got.get().splitlines()
    assert len(lines) <= 22
    assert f"{sum(one.state != 'running' for one in trials)} of 200 done" in " ".join(lines)


def test_those_that_run_and_the_best_that_ended_are_shown() -> None:
    ended = [trial(f"{index}", "finished", 3.0, 1.0 + index) for index in range(100, 140)]
    running = [trial(f"{index}", "running", 2.0) for index in range(200, 203)]
    shown, more = shown_trials(progress(*ended, *running), rows=8)
    assert [one.trial_id for one in shown] == ["200", "201", "202", "100", "101", "102", "103", "104"]
    assert more == 35


def test_a_pipe_gets_lines_now_and_then() -> None:
    pipe = console(terminal=False)
    with sweep_progress("tune a-sweep", quiet=False, console=pipe, every_s=3600) as update:
        for count in range(4):
            update(progress(*HALF[:count], total=3))
    said = seen(pipe).splitlines()
    assert len(said) == 2, "the first, and the last when it is over: the others came too soon after"
    assert said[-1].startswith(
        "tune a-sweep: 3 of 3 done (2 finished, 1 stopped), 0 running; best so far 0.900 at step 8"
    )
    assert "left" not in said[-1]


def test_machines_get_nothing() -> None:
    pipe = console(terminal=False)
    with sweep_progress("tune a-sweep", quiet=True, console=pipe) as update:
        update(progress(*HALF))
    assert seen(pipe) == ""


def test_a_sparkline_falls_with_the_loss() -> None:
    assert sparkline([3.0, 2.0, 1.0, float("nan"), 9.0], 1.0, 3.0) == "█▅▁██"
